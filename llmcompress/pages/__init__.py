"""What people look at: one HTML page about a run or several, and the same in Markdown. No torch."""

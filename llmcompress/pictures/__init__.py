"""Pictures as text: standalone SVG documents without scripts or outside references, and their form for terminals."""

"""What Triton compiles; only imported where triton is there. The functions around it are one folder up."""

"""`python -m llmcompress`, and `torchrun -m llmcompress`."""

from llmcompress.cli import main

if __name__ == "__main__":
    main()

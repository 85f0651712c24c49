"""The MODEL word of the command line, for the rooms that open models."""

from llmcompress.hub.source import Source as Source
from llmcompress.hub.source import resolve as resolve

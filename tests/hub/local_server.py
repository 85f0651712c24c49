"""A server on a free port of this machine, and the environment of programs that know no other hub."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler], released: Event) -> Iterator[str]:
    """The address of a server with one kind of handler; `released` lets go of those that hang, at the end."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            released.set()
            server.shutdown()
            thread.join()


def knowing_only(url: str, home: Path) -> dict[str, str]:
    """The environment of a process whose hub is at `url` and keeps its cache in `home`."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    return clean | {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}

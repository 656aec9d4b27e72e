"""A Cloud Storage of this machine: oittaa's emulator, which here also keeps the condition that an object must not be there yet."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import ThreadingHTTPServer

NAME = "a-bucket"


@contextlib.contextmanager
def serving() -> Iterator[dict[str, str]]:
    """An empty bucket, gs://a-bucket, for processes that have these variables in their environment."""
    from gcp_storage_emulator import server as emulator
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import buckets, objects
    from gcp_storage_emulator.storage import Storage

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    storage, turn = Storage(use_memory_fs=True), threading.RLock()
    buckets.create_bucket(NAME, storage)
    plain = objects.insert

    def insert(request, response, storage, *args, **kwargs):
        name = request.query["name"][0] if "name" in request.query else (request.data or {}).get("meta", {}).get("name")
        if request.query.get("ifGenerationMatch") == ["0"]:
            with contextlib.suppress(NotFound):
                storage.get_file_obj(request.params["bucket_name"], name)
                response.status = HTTPStatus.PRECONDITION_FAILED
                return None
        return plain(request, response, storage, *args, **kwargs)

    class Router(emulator.Router):
        def handle(self, method):
            with turn, contextlib.suppress(ConnectionError):  # one request at a time; who asked may have been killed
                super().handle(method)

    handlers = tuple((path, {m: insert if h is plain else h for m, h in by.items()}) for path, by in emulator.HANDLERS)
    before = emulator.HANDLERS, emulator.Router
    emulator.HANDLERS, emulator.Router = handlers, Router
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: emulator.RequestHandler(storage, *args))
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    place = f"http://127.0.0.1:{httpd.server_port}"
    try:
        yield {
            "STORAGE_EMULATOR_HOST": place,  # gcsfs
            "TENSORSTORE_GCS_HTTP_URL": place,  # Orbax
            "GOOGLE_CLOUD_PROJECT": "nobody",
            "FSSPEC_GCS_TOKEN": "anon",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # or it asks Google what kind of bucket it is
        }
    finally:
        httpd.shutdown()
        httpd.server_close()
        emulator.HANDLERS, emulator.Router = before

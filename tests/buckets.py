"""A Cloud Storage of this machine: oittaa's emulator, which here also tells of generations and heeds conditions on them."""

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

    def generation(request, name) -> str:
        try:
            return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
        except NotFound:
            return "0"

    def insert(request, response, storage, *args, **kwargs):
        name = request.query["name"][0] if "name" in request.query else (request.data or {}).get("meta", {}).get("name")
        if request.query.get("ifGenerationMatch", [None])[0] not in (None, generation(request, name)):
            response.status = HTTPStatus.PRECONDITION_FAILED
            return None
        return objects.insert(request, response, storage, *args, **kwargs)

    def get(request, response, storage, *args, **kwargs):
        now = generation(request, request.params["object_id"])
        if request.query.get("ifGenerationNotMatch") == [now]:
            response.status = HTTPStatus.NOT_MODIFIED
            return None
        response["x-goog-generation"] = now
        return objects.get(request, response, storage, *args, **kwargs)

    class Router(emulator.Router):
        def handle(self, method):
            with turn, contextlib.suppress(ConnectionError):  # one request at a time; who asked may have been killed
                super().handle(method)

    ours = {objects.insert: insert, objects.get: get}
    handlers = tuple((path, {verb: ours.get(each, each) for verb, each in by.items()}) for path, by in emulator.HANDLERS)
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
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL + 1)  # threads that outlive the tests find nobody
        httpd.shutdown()
        httpd.server_close()
        emulator.HANDLERS, emulator.Router = before

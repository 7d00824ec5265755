"""A small real bundle, and a raw HTTP client, for the tests of the bundle, the service and the page."""
import http.client
import json
from pathlib import Path

from workbench.data.catalogue import Catalogue
from workbench.data.datasets import load
from workbench.models.baselines import fit_item_knn
from workbench.models.ranker import similar_items
from workbench.optimization.variants import compile_variant
from workbench.serving.bundle import Bundle

HOSTILE = "<img src=x onerror=\"document.title='broken in'\">"  # what a title must never become on the page


def make_bundle(folder: Path, backend: str = "onnxruntime") -> Bundle:
    "The neighbours of MovieLens-100K; the most popular film has a title that tries to be markup."
    log = load("movielens-100k")
    histories = log.histories()
    model = fit_item_knn(histories.train)
    titles = log.catalogue.titles.astype("U120")
    titles[log.catalogue.positions["50"]] = HOSTILE
    variant = compile_variant(model, folder / "variant", backend, k=50)
    return Bundle.create(variant, Catalogue(log.catalogue.item_ids, titles), histories, None, folder / "bundle",
                         name="item_knn", version=7, similar=similar_items(model, 50), lineage={"run_id": "a-test"})


def call(port: int, method: str, path: str, body: bytes | None = None, headers: dict | None = None):
    "Send bytes as they are; return status, headers and text."
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read().decode()
    finally:
        connection.close()


def post(port: int, path: str, body, **headers):
    "Send JSON (or bytes as they are); return status, headers and the parsed answer."
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, received, text = call(port, "POST", path, sent, headers)
    return status, received, json.loads(text)

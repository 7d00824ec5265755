"""The ranking service over real HTTP: contract, refusals, readiness, overload, counters, and parity with the engine."""
import json
import os
import shutil
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from ranking import call, make_bundle, post

from workbench.errors import BundleError, ServiceError
from workbench.serving.contracts import ErrorResponse, HistoryResponse, ListenersResponse, RankResponse, openapi
from workbench.serving.engine import Engine
from workbench.serving.guards import PLACES
from workbench.serving.packaging import build_bento, free_port, questions, running, serve_command, stop
from workbench.settings import Serving, settings

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("service"))


@pytest.fixture(scope="module")
def engine(bundle):
    return Engine(bundle)


@pytest.fixture(scope="module")
def port(bundle):
    with running(bundle.folder) as port:
        yield port


def refusal(port, body, path="/recommend"):
    "Post what must be refused; return status, code and field of a well-formed error."
    status, headers, answer = post(port, path, body)
    ErrorResponse.model_validate(answer)
    assert headers["x-request-id"] and headers["content-type"] == "application/json"
    for inside in ("Traceback", "/work", ".py", str(ROOT)):
        assert inside not in json.dumps(answer)
    return status, answer["error"]["code"], answer["error"]["field"]


def test_the_committed_document_is_the_contract():
    "When this fails the contract changed: write the new document with write_json('docs/openapi.json', openapi())."
    assert json.loads((ROOT / "docs/openapi.json").read_text()) == openapi(Serving())


def test_the_service_shows_its_own_document(port):
    assert json.loads(call(port, "GET", "/openapi.json")[2]) == openapi(settings().serving)


def test_every_kind_of_question_is_answered_like_the_engine(port, engine):
    asked = questions(engine, users=60)
    assert len(asked) == 68
    for path, body in asked:
        status, _, answer = post(port, path, body)
        assert status == 200
        RankResponse.model_validate(answer)
        expected = engine.similar(**body) if path == "/similar" else engine.recommend(**body)
        assert {k: v for k, v in answer.items() if k != "request_id"} == json.loads(json.dumps(expected.to_dict()))


def test_an_answer_has_exactly_the_promised_shape(port):
    _, headers, answer = post(port, "/recommend", {"user_id": "1", "k": 3}, **{"X-Request-ID": "mine"})
    assert list(answer) == ["items", "model", "request_id", "degraded"] and answer["request_id"] == "mine"
    assert headers["x-request-id"] == "mine"
    assert [list(item) for item in answer["items"]] == [["item_id", "title", "score"]] * 3
    assert answer["model"] == {"name": "item_knn", "version": "7", "variant": "onnxruntime"}
    assert answer["degraded"] is False
    scores = [item["score"] for item in answer["items"]]
    assert scores == sorted(scores, reverse=True)


def test_seen_items_are_left_out_unless_asked_for(port, engine):
    seen = {engine.item_ids[i] for i in engine.history_of("1").tolist()}

    def answered(**body):
        return {item["item_id"] for item in post(port, "/recommend", {"user_id": "1", "k": 50} | body)[2]["items"]}

    assert not answered() & seen and not answered(exclude_seen=True) & seen and answered(exclude_seen=False) & seen


@pytest.mark.parametrize("body, reason", [({"user_id": "nobody"}, "unknown_user"), ({"history": []}, "empty_history"),
                                          ({"history": ["no such film"]}, "unknown_items")])
def test_with_nothing_to_go_by_the_popular_list_comes_marked(port, engine, body, reason):
    status, headers, answer = post(port, "/recommend", body)
    assert status == 200 and answer["degraded"] is True and headers["x-degraded-reason"] == reason
    assert [item["item_id"] for item in answer["items"]] == [engine.item_ids[i] for i in engine.favourites[:10]]


def test_unknown_items_among_known_ones_are_ignored(port):
    known, mixed = (post(port, "/recommend", {"history": h})[2]["items"] for h in (["50", "181"], ["50", "?", "181"]))
    assert known == mixed


def test_ids_are_text_and_nothing_in_them_matters(port):
    for odd in ("../../etc/passwd", "' OR 1=1 --", "<script>", "\u0000", "日本語", "1 "):
        assert post(port, "/recommend", {"user_id": odd})[2]["degraded"] is True


def test_a_bad_request_id_is_replaced(port):
    answer = post(port, "/recommend", {"user_id": "1"}, **{"X-Request-ID": "a b<script>"})[2]
    assert len(answer["request_id"]) == 32


@pytest.mark.parametrize("body, status, code, field", [
    (b"", 400, "json_invalid", None),
    (b"{", 400, "json_invalid", None),
    (b'{"user_id": "1",}', 400, "json_invalid", None),
    (b"\xff\xfe", 400, "json_invalid", None),
    (b'{"user_id": "\\ud800"}', 400, "json_invalid", None),
    (b"[" * 30_000, 400, "json_invalid", None),
    (b'{"history": ' + b"[" * 5_000 + b"]" * 5_000 + b"}", 400, "json_invalid", None),
    (b'{"a": ' * 5_000 + b"1" + b"}" * 5_000, 400, "json_invalid", None),
    (b"[]", 422, "model_type", None),
    (b"null", 422, "model_type", None),
    (b"{}", 422, "exactly_one", None),
    ({"user_id": "1", "history": ["50"]}, 422, "exactly_one", None),
    ({"user_id": "1", "kk": 7}, 422, "extra_forbidden", "kk"),
    ({"user_id": "1", "k": "7"}, 422, "int_type", "k"),
    ({"user_id": "1", "k": 7.5}, 422, "int_type", "k"),
    ({"user_id": "1", "k": True}, 422, "int_type", "k"),
    ({"user_id": "1", "k": None}, 422, "int_type", "k"),
    ({"user_id": "1", "k": 0}, 422, "greater_than_equal", "k"),
    ({"user_id": "1", "k": -1}, 422, "greater_than_equal", "k"),
    ({"user_id": "1", "k": 51}, 422, "too_large", "k"),
    ({"user_id": "1", "k": 10**30}, 422, "too_large", "k"),
    (b'{"user_id": "1", "k": NaN}', 422, "int_type", "k"),
    (b'{"user_id": "1", "k": Infinity}', 422, "int_type", "k"),
    (b'{"user_id": "1", "k": 1e999}', 422, "int_type", "k"),
    ({"user_id": 1}, 422, "string_type", "user_id"),
    ({"user_id": ""}, 422, "string_too_short", "user_id"),
    ({"user_id": "x" * 65}, 422, "string_too_long", "user_id"),
    ({"history": "50"}, 422, "list_type", "history"),
    ({"history": ["50", 181]}, 422, "string_type", "history.1"),
    ({"history": ["50", None]}, 422, "string_type", "history.1"),
    ({"history": ["50"] * 1001}, 422, "too_long", "history"),
    ({"user_id": "1", "exclude_seen": "yes"}, 422, "bool_type", "exclude_seen"),
], ids=lambda value: str(value)[:40])
def test_a_malformed_body_is_refused_with_its_field(port, body, status, code, field):
    got = refusal(port, body)
    assert (got[0], got[2]) == (status, field)
    assert got[1] == code or (code == "int_type" and got[1] in ("int_from_float", "finite_number", "int_type"))


def test_a_similar_request_is_checked_too(port):
    assert refusal(port, {"item_id": "none such"}, "/similar") == (404, "unknown_item", "item_id")
    assert refusal(port, {"user_id": "1"}, "/similar")[0] == 422
    assert refusal(port, {"item_id": 50}, "/similar") == (422, "string_type", "item_id")


def test_an_oversized_body_is_refused_before_it_is_read(port):
    status, _, answer = post(port, "/recommend", b'{"history": ["' + b"x" * 70_000 + b'"]}')
    assert status == 413 and answer["error"]["code"] == "too_large"
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sender, sender.makefile("rb") as reader:
        sender.sendall(head(400_000_000))  # and nothing of it: the answer does not wait
        assert reader.readline().startswith(b"HTTP/1.1 413")


def test_a_chunked_body_is_counted_while_it_arrives(port):
    "No length is announced; the sender goes on until it is told to stop."
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sender:
        sender.sendall(b"POST /recommend HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n")
        try:
            for _ in range(4_000):
                sender.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")
        except OSError:
            pass
        else:
            pytest.fail("16 MB were taken")
    assert post(port, "/recommend", {"user_id": "1"})[0] == 200


def test_unknown_paths_and_methods_are_json_errors(port):
    for method, path, status in (("GET", "/nowhere", 404), ("GET", "/recommend", 405), ("DELETE", "/", 405)):
        got, _, text = call(port, method, path)
        assert got == status and ErrorResponse.model_validate_json(text).error.field is None


def test_what_the_page_asks_for(port, engine):
    known = HistoryResponse.model_validate_json(call(port, "GET", "/history?user_id=1")[2])
    assert known.total == len(engine.history_of("1")) and len(known.items) == 100
    newest = engine.history_of("1")[-100:].tolist()
    assert [item.item_id for item in known.items] == [engine.item_ids[i] for i in newest]
    found = ListenersResponse.model_validate_json(call(port, "GET", "/listeners?query=94")[2])
    assert found.user_ids == ["94", "940", "941", "942", "943"] and found.total == 943
    assert call(port, "GET", "/history?user_id=nobody")[0] == 404
    assert call(port, "GET", "/history?user=1")[0] == 422
    assert call(port, "GET", f"/listeners?query={'x' * 65}")[0] == 422


def test_the_page_lets_nothing_else_run(port):
    status, headers, text = call(port, "GET", "/")
    assert status == 200 and "script-src 'sha256-" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"] and "http" not in text.replace("http-equiv", "")


def test_probes_and_counters(port):
    def series():
        return {line.split(" ")[0]: float(line.split(" ")[1]) for line in call(port, "GET", "/metrics")[2].splitlines()
                if not line.startswith("#")}

    assert call(port, "GET", "/livez")[0] == 200 and call(port, "GET", "/readyz")[0] == 200
    before = series()
    post(port, "/recommend", {"user_id": "1"})
    post(port, "/recommend", {"user_id": "nobody"})
    post(port, "/recommend", b"{")
    after = series()
    model = 'model="item_knn"'
    tail = 'variant="onnxruntime",version="7"}'
    for name, more in ((f'workbench_requests_total{{{model},route="/recommend",status="200",{tail}', 2),
                       (f'workbench_requests_total{{{model},route="/recommend",status="400",{tail}', 1),
                       (f'workbench_request_seconds_count{{{model},route="/recommend",{tail}', 3),
                       (f'workbench_degraded_total{{{model},reason="unknown_user",{tail}', 1)):
        assert after[name] - before.get(name, 0) == more, name


def test_a_scanner_makes_no_series(port):
    "Counted are the paths that exist; one that asks for a hundred others leaves no trace."
    for _ in range(2):
        call(port, "GET", "/metrics"), call(port, "GET", "/scan")
    before = call(port, "GET", "/metrics")[2].count("\n")
    for i in range(100):
        call(port, "GET", f"/scan/{i}")
    assert call(port, "GET", "/metrics")[2].count("\n") == before


def head(length, more=b""):
    "Write the head of a request whose body is sent by hand."
    return b"POST /recommend HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n%s\r\n" % (length, more)


def burst(port, number):
    "Send the same request over many connections at once; return the replies."
    body = json.dumps({"user_id": "1"}).encode()
    request = head(len(body), b"Connection: close\r\n") + body
    senders = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(number)]
    for sender in senders:
        sender.sendall(request)
    replies = []
    for sender in senders:
        with sender, sender.makefile("rb") as reader:
            replies.append(reader.read())
    return replies


def test_too_many_at_once_are_told_to_come_back(port):
    replies = burst(port, PLACES * 6)
    accepted = [reply for reply in replies if reply.startswith(b"HTTP/1.1 200")]
    refused = [reply for reply in replies if reply.startswith(b"HTTP/1.1 429")]
    assert len(accepted) + len(refused) == len(replies) and len(accepted) >= PLACES and refused
    assert all(b"retry-after: 1" in reply.lower() and b"overloaded" in reply for reply in refused)
    assert post(port, "/recommend", {"user_id": "1"})[0] == 200


def test_half_sent_requests_hold_no_place(port):
    senders = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(PLACES + 16)]
    try:
        for sender in senders:
            sender.sendall(head(16) + b"{")
        for _ in range(20):
            assert post(port, "/recommend", {"user_id": "1"})[0] == 200
    finally:
        for sender in senders:
            sender.close()


def start(line, environment, log):
    with log.open("wb") as output:
        return subprocess.Popen(line, env=environment, cwd=log.parent, stdout=output, stderr=subprocess.STDOUT)


def wait(test, patience=60):
    ends = time.monotonic() + patience
    while time.monotonic() < ends:
        try:
            if test():
                return
        except OSError:
            pass
        time.sleep(0.1)
    pytest.fail("it did not happen")


def test_a_damaged_bundle_is_never_ready(bundle, tmp_path):
    "The process lives and says so; it is not ready, and tells a client nothing about why."
    damaged = shutil.copytree(bundle.folder, tmp_path / "bundle")
    (damaged / "popular.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(BundleError, match=r"popular\.npy was changed"):
        serve_command(damaged)
    port, log = free_port(), tmp_path / "log"
    line, environment = serve_command(bundle.folder, port=port)
    process = start(line, environment | {"WORKBENCH_BUNDLE": str(damaged)}, log)
    try:
        wait(lambda: call(port, "GET", "/livez")[0] == 200)
        wait(lambda: "popular.npy was changed" in log.read_text())
        assert call(port, "GET", "/readyz")[0] == 503
        assert refusal(port, {"user_id": "1"}) == (503, "not_ready", None)
        assert post(port, "/recommend", {"user_id": "1"})[1]["retry-after"] == "2"
    finally:
        stop(process)


def test_a_request_under_way_is_answered_when_the_service_is_told_to_stop(bundle, tmp_path):
    port = free_port()
    process = start(*serve_command(bundle.folder, port=port), tmp_path / "log")
    try:
        wait(lambda: call(port, "GET", "/readyz")[0] == 200)
        body = json.dumps({"user_id": "1"}).encode()
        with socket.create_connection(("127.0.0.1", port), timeout=30) as sender:
            sender.sendall(head(len(body)) + body[:5])
            post(port, "/recommend", {"user_id": "1"})
            process.terminate()
            time.sleep(1)
            sender.sendall(body[5:])
            with sender.makefile("rb") as reader:
                assert reader.readline().startswith(b"HTTP/1.1 200")
        assert process.wait(30) == 0
    finally:
        stop(process)


def test_the_variable_that_executes_pickles_stops_the_start(bundle, tmp_path, monkeypatch):
    line, environment = serve_command(bundle.folder, port=free_port())
    process = start(line, environment | {"BENTOML_NO_UDS": "1"}, tmp_path / "log")
    try:
        assert process.wait(60) != 0
    finally:
        stop(process)
    assert "BENTOML_NO_UDS" in (tmp_path / "log").read_text()
    monkeypatch.setenv("BENTOML_NO_UDS", "1")
    with pytest.raises(ServiceError, match="BENTOML_NO_UDS"):
        serve_command(bundle.folder)


def test_it_listens_on_this_machine_alone(port):
    files = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")]
    lines = [line.split() for text in files for line in text.splitlines()[1:]]
    addresses = {line[1] for line in lines if line[3] == "0A"}
    assert [a.split(":")[0] for a in addresses if int(a.split(":")[1], 16) == port] == ["0100007F"]


@pytest.mark.parametrize("name, content, why", [
    (".env", "TOKEN=1", ".env is named like a secret"),
    ("notes.md", "-----BEGIN " + "PRIVATE KEY-----", "notes.md holds what looks like a secret"),
    ("hosts", None, "hosts is a link"),
])
def test_a_secret_or_a_link_in_the_build_folder_stops_the_build(bundle, tmp_path, name, content, why):
    services = tmp_path / "bentos"
    shutil.copytree(ROOT / "bentos/ranking", services / "ranking")
    if content is None:
        (services / "ranking" / name).symlink_to("/etc/hosts")
    else:
        (services / "ranking" / name).write_text(content)
    paths = replace(settings().paths, home=Path("home"), bentos=Path("bentos"))
    chosen = replace(settings(), root=tmp_path, paths=paths)
    with pytest.raises(ServiceError, match=why):
        build_bento(bundle, chosen)
    assert not os.path.exists(tmp_path / "home/bentoml/bentos")

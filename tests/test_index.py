"""Indexes: filters come before the k, what is damaged or wrong is refused, and what is approximate is measured."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from workbench.errors import BackendError
from workbench.files import sha256
from workbench.models.sequential import SASRec
from workbench.optimization.approximate import GRAPH, GraphIndex, Hnswlib, Usearch, build_tuned, tune
from workbench.optimization.index import (
    MANIFEST,
    TABLE,
    Exact,
    Int8,
    ItemIndex,
    best,
    known_indexes,
    load_index,
    recall,
)
from workbench.optimization.retrieval import Retrieval
from workbench.optimization.variants import Variant, compile_variant

N_ITEMS, WIDTH = 6_000, 32
METHODS = {"exact": Exact(), "int8": Int8(), "usearch": Usearch(metric="ip"), "hnswlib": Hnswlib(metric="ip"),
           "bf16": Usearch(metric="ip", dtype="bf16", ef=128), "longer": Hnswlib(metric="l2", ef=512)}


def made(rows=200):
    draw = np.random.default_rng(0)
    centres = draw.standard_normal((40, WIDTH))
    points = centres[draw.integers(0, 40, N_ITEMS + 1 + rows)] + 0.6 * draw.standard_normal((N_ITEMS + 1 + rows, WIDTH))
    points = (0.3 * points * draw.lognormal(0, 0.2, (len(points), 1))).astype(np.float32)
    return points[:N_ITEMS + 1], points[N_ITEMS + 1:]


VECTORS, QUERIES = made()
NOTHING = np.zeros((len(QUERIES), 1), np.int64)
TRUTH = ItemIndex(VECTORS)


def first(many):
    return TRUTH.search(QUERIES, NOTHING, many)[0]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("indexes"), {}

    def get(name):
        if reason := METHODS[name].available():
            pytest.skip(reason)
        if name not in made:
            made[name] = METHODS[name].build(VECTORS, folder / name)
        return load_index(made[name])

    return get


@pytest.mark.parametrize("name", METHODS)
def test_the_scores_are_the_inner_products_and_the_best_come_first(opened, name):
    index = opened(name)
    assert recall(index, TRUTH, QUERIES) >= 0.99
    ids, scores = index.search(QUERIES, NOTHING)
    np.testing.assert_allclose(scores, np.einsum("bkd,bd->bk", VECTORS[ids], QUERIES), rtol=1e-5, atol=1e-5)
    assert (np.diff(scores, axis=1) <= 1e-6).all() and (ids > 0).all()
    assert all(len(set(row)) == 10 for row in ids.tolist())


@pytest.mark.parametrize("name", METHODS)
def test_filters_come_before_the_k(opened, name):
    "The best 500 excluded: the exact filtered answer comes back, and filtering afterwards would have given nothing."
    index, excluded = opened(name), first(500)
    ids, scores = index.search(QUERIES, excluded)
    assert recall(index, TRUTH, QUERIES, exclude=excluded) >= 0.99
    assert np.isfinite(scores).all() and not (ids[:, :, None] == excluded[:, None]).any()
    plain = index.search(QUERIES, NOTHING)[0]
    kept = [np.setdiff1d(row, out) for row, out in zip(plain, excluded, strict=True)]
    assert max(map(len, kept)) < 10 and sum(map(len, kept)) < 0.01 * plain.size


@pytest.mark.parametrize("name", ["usearch", "hnswlib", "bf16", "longer"])
def test_a_walk_finds_what_a_usual_history_leaves_without_a_scan(opened, name, monkeypatch):
    index, excluded = opened(name), np.ascontiguousarray(first(60 if name == "longer" else 8)[:, ::2])
    monkeypatch.setattr("workbench.optimization.approximate.allowed", lambda *inputs: pytest.fail("it scanned"))
    index.search(QUERIES, excluded)
    monkeypatch.undo()
    assert recall(index, TRUTH, QUERIES, exclude=excluded) >= 0.98


@pytest.mark.parametrize("name", ["usearch", "hnswlib", "bf16"])
def test_what_a_graph_of_inner_products_cannot_reach_is_scanned_for(opened, name):
    "With the limit of walks lifted and the best 50 excluded, the answer is the exact one (rounded numbers hide some of the 50)."
    index, excluded = opened(name), first(50)
    index.limit = index.size
    assert recall(index, TRUTH, QUERIES, exclude=excluded) >= (0.99 if name == "bf16" else 0.999)


@pytest.mark.parametrize("name", METHODS)
def test_blocked_items_disappear_for_everybody_and_come_back(opened, name):
    index = opened(name)
    before, gone = index.search(QUERIES, NOTHING)[0], np.unique(first(3))
    index.block(gone)
    ids, scores = index.search(QUERIES, NOTHING)
    assert not np.isin(ids, gone).any() and np.isfinite(scores).all()
    other = ItemIndex(VECTORS)
    other.block(gone)
    assert recall(index, other, QUERIES) >= 0.99
    index.unblock(gone)
    np.testing.assert_array_equal(index.search(QUERIES, NOTHING)[0], before)
    index.unblock(np.array([0]))
    assert 0 not in index.search(QUERIES, NOTHING, 50)[0]
    with pytest.raises(BackendError, match="outside the catalogue"):
        index.block(np.array([N_ITEMS + 1]))


@pytest.mark.parametrize("name", METHODS)
def test_when_the_items_run_out_the_other_places_are_no_answer(opened, name):
    index, all_but_two = opened(name), np.arange(3, N_ITEMS + 1)[None]
    ids, scores = index.search(QUERIES[:1], all_but_two)
    assert set(ids[0, :2]) == {1, 2} and (ids[0, 2:] == 0).all() and (scores[0, 2:] == -np.inf).all()
    ids, scores = index.search(QUERIES[:1], NOTHING[:1], N_ITEMS + 5)
    assert len(set(ids[0, :N_ITEMS])) == N_ITEMS and (scores[0, N_ITEMS:] == -np.inf).all()
    index.block(np.arange(1, N_ITEMS + 1))
    assert (index.search(QUERIES[:2], NOTHING[:2])[1] == -np.inf).all()


@pytest.mark.parametrize("name", METHODS)
def test_one_query_and_256_are_answered_alike(opened, name):
    index, many = opened(name), np.resize(QUERIES, (256, WIDTH))
    ids = index.search(many, np.zeros((256, 4), np.int64))[0]
    alone = np.vstack([index.search(many[i:i + 1], np.zeros((1, 1), np.int64))[0] for i in range(256)])
    assert (ids == alone).mean() > 0.999
    one = index.search(many[:1], np.zeros((1, 0), np.int64))[0]
    np.testing.assert_array_equal(one, alone[:1])


@pytest.mark.parametrize("name", METHODS)
def test_what_cannot_be_answered_is_a_typed_error_and_the_next_search_is_right(opened, name):
    index, one, none = opened(name), QUERIES[:1], NOTHING[:1]
    bad = [((one.astype(np.float64), none), "float32"), ((one[:, :-1], none), "float32"), ((one[0], none), "float32"),
           ((one, none.astype(np.int32)), "int64"), ((one, none[0]), "int64"), ((one, NOTHING[:2]), "do not belong"),
           ((one[:0], none[:0]), "do not belong"), ((one * np.float32(np.nan), none), "NaN"), ((one, none, 0), "do not belong"),
           ((one, none + N_ITEMS + 1), "outside the catalogue"), ((one, none - 1), "outside the catalogue")]
    for inputs, message in bad:
        with pytest.raises(BackendError, match=message):
            index.search(*inputs)
    assert index.search(one, none)[0][0, 0] == first(1)[0, 0]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("share", [0.001, 0.01, 0.2, 0.5, 0.999])
def test_whatever_share_is_blocked_the_best_of_the_rest_come_back(opened, name, share):
    "Blocked at random, and all of the best of each query on top, some of them excluded by the request."
    index, truth = opened(name), ItemIndex(VECTORS)
    gone = np.unique(np.r_[np.random.default_rng(1).permutation(N_ITEMS)[:int(share * N_ITEMS)] + 1, first(12)[:40].ravel()])
    for each in (index, truth):
        each.block(gone)
    for excluded in (NOTHING, first(30)):
        ids, scores = index.search(QUERIES, excluded)
        assert not np.isin(ids, gone).any() and not ((ids[:, :, None] == excluded[:, None]) & (ids[:, :, None] > 0)).any()
        assert (np.isfinite(scores).sum(axis=1) == np.isfinite(truth.search(QUERIES, excluded)[1]).sum(axis=1)).all()
        assert recall(index, truth, QUERIES, exclude=excluded) >= 0.98
    index.unblock(gone)
    np.testing.assert_array_equal(index.search(QUERIES[:5], NOTHING[:5])[0], opened(name).search(QUERIES[:5], NOTHING[:5])[0])


@pytest.mark.parametrize("order", [("usearch", "int8"), ("int8", "usearch")])
def test_indexes_of_two_libraries_open_in_one_process_in_any_order(opened, tmp_path, order):
    "Where usearch is imported before ONNX Runtime, the process used to end with a segmentation fault."
    for name in order:
        opened(name)
        METHODS[name].build(VECTORS[:500], tmp_path / name)
    program = ("import sys\nfrom workbench.optimization.index import load_index\n"
               "for folder in sys.argv[1:]: print(load_index(folder).size)")
    done = subprocess.run([sys.executable, "-c", program, *(str(tmp_path / name) for name in order)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == ["499", "499"], done.stderr[-500:]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_single_number_that_is_none_is_found_wherever_it_stands(opened, name, wrong):
    index = opened(name)
    for row, place, rows in ((0, 0, 1), (0, WIDTH - 1, 1), (2, 5, 4)):
        queries = QUERIES[:rows].copy()
        queries[row, place] = wrong
        for excluded in (NOTHING[:rows], np.tile(np.arange(1, N_ITEMS + 1), (rows, 1))):
            with pytest.raises(BackendError, match="NaN or infinity"):
                index.search(queries, excluded)
    everything = np.arange(1, N_ITEMS + 1)[None]
    assert (index.search(QUERIES[:1], everything)[1] == -np.inf).all()     # no answer, and nothing wrong with the query


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "added", "swapped"])
def test_a_damaged_folder_is_refused_before_a_library_opens_it(tmp_path, name, damage):
    if reason := METHODS[name].available():
        pytest.skip(reason)
    small, folder = VECTORS[:201], tmp_path / "index"
    METHODS[name].build(small, folder)
    path = next((p for p in sorted(folder.iterdir()) if p.name not in (MANIFEST, TABLE)), folder / TABLE)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "flipped":
        path.write_bytes(data)
    elif damage == "missing":
        path.unlink()
    elif damage == "added":
        (folder / "more.bin").write_bytes(b"more")
    else:
        METHODS[name].build(VECTORS[200:401], tmp_path / "other")
        (tmp_path / "other" / path.name).replace(path)
    with pytest.raises(BackendError, match="is damaged"):
        load_index(folder)


def test_a_graph_of_another_size_is_refused_even_with_the_right_checksum(tmp_path):
    folder = Hnswlib().build(VECTORS[:201], tmp_path / "index")
    other = Hnswlib().build(VECTORS[:301], tmp_path / "other")
    (other / GRAPH).replace(folder / GRAPH)
    described = json.loads((folder / MANIFEST).read_text())
    described["files"][GRAPH] = sha256(folder / GRAPH)
    (folder / MANIFEST).write_text(json.dumps(described))
    with pytest.raises(BackendError, match="has 300 items and the table 200"):
        load_index(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"method": "exact"}', '{"method": "exact", "config": {"depth": 3}, "files": {}}'])
def test_a_manifest_that_is_none_is_refused(tmp_path, text):
    folder = Exact().build(VECTORS[:11], tmp_path / "index")
    (folder / MANIFEST).write_text(text)
    with pytest.raises(BackendError, match="is not an index"):
        load_index(folder)


def test_an_unknown_method_is_named(tmp_path):
    folder = Exact().build(VECTORS[:11], tmp_path / "index")
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace('"exact"', '"hnswlob"'))
    with pytest.raises(BackendError, match="did you mean 'hnswlib'"):
        load_index(folder)
    assert list(known_indexes()) == ["exact", "int8", "hnswlib", "usearch"]


@pytest.mark.parametrize("name", METHODS)
def test_vectors_that_are_not_finite_are_refused_and_nothing_is_left(tmp_path, name):
    poisoned = VECTORS[:50].copy()
    poisoned[7, 3] = np.inf
    for vectors, message in ((poisoned, "item 7"), (VECTORS[:50].astype(np.float64), "float32"), (VECTORS[:1], "at least one")):
        with pytest.raises(BackendError, match=message):
            METHODS[name].build(vectors, tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_is_checked():
    for method, fields, message in ((Usearch, {"dtype": "f64"}, "'f64' is none"), (Hnswlib, {"metric": "cosine"}, "'cosine' is neither"),
                                    (Hnswlib, {"ef": 0}, "ef must be"), (Usearch, {"connectivity": 1}, "connectivity must be")):
        with pytest.raises(BackendError, match=message):
            method(**fields)


def test_tuning_takes_the_smallest_width_and_says_when_there_is_none(opened, tmp_path):
    index = opened("hnswlib")
    table = tune(index, TRUTH, QUERIES, wanted=0.95)
    assert [row["recall"] >= 0.95 for row in table.rows] == [False] * (len(table.rows) - 1) + [True]
    assert index.ef == table.rows[-1]["ef"]
    with pytest.raises(BackendError, match="is wanted"):
        tune(index, TRUTH, QUERIES, wanted=1.01, widths=(16,))
    build_tuned(Hnswlib(), VECTORS, tmp_path / "tuned", QUERIES, wanted=0.98)
    tuned = load_index(tmp_path / "tuned")
    assert isinstance(tuned, GraphIndex) and recall(tuned, TRUTH, QUERIES) >= 0.98


def test_recall_can_be_low():
    assert recall(ItemIndex(np.roll(VECTORS, 1, axis=0)), TRUTH, QUERIES) < 0.2


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
@pytest.mark.parametrize("n", [1, 9, 640, 5_000, 30_011])
def test_the_best_places_are_those_of_a_sort(dtype, n):
    draw = np.random.default_rng(n)
    for values in (draw.normal(size=n) * 1000, np.zeros(n), -np.arange(n), np.arange(n)):
        row = values.astype(dtype)
        np.testing.assert_array_equal(row[best(row, 10)], np.sort(row)[::-1][:10])


def test_an_index_that_is_too_wrong_is_not_published(tmp_path):
    "The floor of the parity check holds for indexes: a graph so narrow that it misses most is refused."
    torch.manual_seed(0)
    model = SASRec(n_items=2_000, length=12, width=16).eval()
    torch.nn.init.normal_(model.items.weight, std=0.5)
    narrow = Retrieval(name="narrow", method=Hnswlib(metric="ip", connectivity=2, ef_construction=8, ef=1), agreement=0.9, wanted=0.0)
    with pytest.raises(BackendError, match="of the parent's top 10 survived"):
        compile_variant(model, tmp_path / "narrow", "onnxruntime", narrow)
    assert not (tmp_path / "narrow").exists()
    assert compile_variant(model, tmp_path / "wide", "onnxruntime", "hnswlib") == Variant.load(tmp_path / "wide")

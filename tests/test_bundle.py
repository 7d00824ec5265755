"""A bundle that is not what its manifest says is refused, with the file named; the untouched copy is accepted."""
import json
import pickle
import shutil
import zipfile

import pytest
from ranking import make_bundle

from workbench.errors import BundleError
from workbench.serving.bundle import MANIFEST, Bundle


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle")).folder


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "bundle")


def files(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def test_a_copy_elsewhere_is_accepted(copy):
    assert Bundle.load(copy).name == "item_knn"


def test_a_flipped_byte_in_any_file_is_refused(copy):
    for path in files(copy):
        if path.name == MANIFEST:
            continue
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(BundleError, match=path.name):
            Bundle.load(copy)
        path.write_bytes(content)
    assert Bundle.load(copy).name == "item_knn"


def test_a_missing_file_is_refused(copy):
    for path in files(copy):
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(BundleError, match=path.name):
            Bundle.load(copy)
        path.write_bytes(content)


@pytest.mark.parametrize("name, content", [("notes.json", b"{}"), ("variant/extra.onnx", b"\x08\x01"),
                                           ("histories/more.json", b"{}")])
def test_an_added_file_is_refused(copy, name, content):
    (copy / name).write_bytes(content)
    with pytest.raises(BundleError, match="was added"):
        Bundle.load(copy)


class Bomb:
    "Leaves a mark when it is unpickled."

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def list_file(folder, name):
    "Put a file into the manifest, as somebody would who can write there."
    from workbench.files import sha256

    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = sha256(folder / name)
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["variant/model.pkl", "variant/model.pt", "variant/last.ckpt", "weights.bin",
                                  "similar/more.npy", "variant/model.data", "more.json", "model.joblib"])
def test_a_pickle_is_refused_unopened_under_any_name(copy, tmp_path, name):
    "It stands in the manifest with its right checksum, so the checksum is not what refuses it."
    (copy / name).write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    list_file(copy, name)
    with pytest.raises(BundleError, match=name):
        Bundle.load(copy)
    assert not (tmp_path / "mark").exists()


def test_a_pickle_inside_an_archive_is_refused(copy):
    with zipfile.ZipFile(copy / "variant/program.pt2", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(1))
    list_file(copy, "variant/program.pt2")
    with pytest.raises(BundleError, match=r"holds the pickle archive/data\.pkl"):
        Bundle.load(copy)


def test_an_array_of_objects_is_refused(copy, tmp_path):
    "An .npy file may hold a pickle; its first bytes are those of an array."
    import numpy as np

    np.save(copy / "popular.npy", np.array([Bomb(tmp_path / "mark")], dtype=object), allow_pickle=True)
    list_file(copy, "popular.npy")
    with pytest.raises(BundleError, match="cannot be used"):
        Bundle.load(copy)
    assert not (tmp_path / "mark").exists()


def test_a_link_is_refused(copy, tmp_path):
    (tmp_path / "outside.npy").write_bytes((copy / "popular.npy").read_bytes())
    (copy / "popular.npy").unlink()
    (copy / "popular.npy").symlink_to(tmp_path / "outside.npy")
    with pytest.raises(BundleError, match=r"popular\.npy is a link"):
        Bundle.load(copy)


@pytest.mark.parametrize("schema", [0, 2, "1", None])
def test_an_unknown_schema_is_refused(copy, schema):
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(manifest | {"schema": schema}))
    with pytest.raises(BundleError, match="schema"):
        Bundle.load(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00"])
def test_a_manifest_that_is_none_is_refused(copy, text):
    (copy / MANIFEST).write_text(text)
    with pytest.raises(BundleError):
        Bundle.load(copy)


def test_parts_of_another_catalogue_are_refused(copy):
    "Every checksum is right; the histories point past the items."
    import numpy as np

    items = np.load(copy / "histories/items.npy")
    items[5] = 10_000
    np.save(copy / "histories/items.npy", items)
    list_file(copy, "histories/items.npy")
    with pytest.raises(BundleError, match=r"items\.npy does not belong to a variant of 1,682 items"):
        Bundle.load(copy)


def test_a_bundle_is_written_whole_or_not_at_all(whole, tmp_path, monkeypatch):
    from workbench.serving import bundle as module

    before = Bundle.load(whole)
    monkeypatch.setattr(module, "check_bundle", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make_bundle(tmp_path)
    assert not (tmp_path / "bundle").exists() and list(tmp_path.glob(".*")) == []
    assert before.name == "item_knn"

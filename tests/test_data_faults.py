"""Damaged, dirty and too small logs: refused or set aside, named, and with nothing left half-written."""
import json
import time

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from workbench.data import datasets, interactions
from workbench.data.batches import WindowBatches
from workbench.data.histories import Histories
from workbench.data.interactions import read_interactions
from workbench.errors import DataError

DAY = 1_577_923_200  # 2020-01-02 in unix seconds


def events(users: int = 20, each: int = 6) -> pl.DataFrame:
    "A clean log in time order, user by user."
    rows = [(f"u{u}", f"i{(u * 7 + step * 3) % 40}", DAY + 100 * step + u) for u in range(users) for step in range(each)]
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")


def write(folder, table: pl.DataFrame, name: str = "log.csv"):
    table.write_csv(folder / name)
    return folder / name


def read(path, home, **options):
    return read_interactions(path, home=home, **options)


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


def test_the_control_a_clean_log_loses_nothing(tmp_path, home):
    log = read(write(tmp_path, events()), home)
    assert len(log) == 120 and not log.report.rows and not home.exists()


@pytest.mark.parametrize(("column", "value", "reason"), [
    ("user_id", None, "user_id is missing"), ("item_id", "", "item_id is missing"), ("item_id", "NaN", "item_id is missing"),
    ("user_id", "x" * 65, "user_id is longer"), ("timestamp", None, "timestamp is missing"), ("timestamp", "NaN", "not finite"),
    ("timestamp", "inf", "not finite"), ("timestamp", "-1", "negative"), ("timestamp", "0", "before 1990"),
    ("timestamp", "1956-06-01", "before 1970"), ("timestamp", "soon", "neither a number nor an ISO date"),
    pytest.param("timestamp", str(int(time.time()) + 10 * 86_400), "in the future", id="timestamp-in ten days")])   # one name, whenever it is read
def test_a_bad_row_is_quarantined_with_its_line_and_reason(tmp_path, home, column, value, reason):
    table = events().with_columns(pl.col("timestamp").cast(pl.String))
    here = pl.int_range(pl.len()) == 17
    table = table.with_columns(pl.when(here).then(pl.lit(value)).otherwise(pl.col(column)).alias(column))
    log = read(write(tmp_path, table), home)
    bad = pl.read_csv(next((home / "quarantine").iterdir()), infer_schema=False)
    assert len(log) == 119 and bad["row"].to_list() == ["19"] and reason in bad["reason"][0]
    assert log.report.rows[0]["rows"] == 1 and reason in log.report.rows[0]["reason"]


def test_a_future_row_would_become_the_test_target_without_its_guard(tmp_path, home, monkeypatch):
    future = pl.DataFrame({"user_id": ["u0"], "item_id": ["i1"], "timestamp": [int(time.time()) + 10 * 86_400]})
    path = write(tmp_path, pl.concat([future, events()]))

    def last(log):
        history = log.histories()
        return history.decode(history.test.targets[:1])[0]
    clean = last(read(write(tmp_path, events(), "clean.csv"), home))
    assert last(read(path, home)) == clean
    monkeypatch.setattr(interactions, "SLACK", 100 * 86_400)
    assert last(read(path, home)) == "i1" != clean


def test_too_many_bad_rows_stop_and_a_raised_limit_lets_them_pass(tmp_path, home):
    table = events().with_columns(pl.when(pl.int_range(pl.len()) < 30).then(0).otherwise("timestamp").alias("timestamp"))
    path = write(tmp_path, table)
    with pytest.raises(DataError, match=r"log\.csv has 30 bad rows of 120 \(30 × timestamp is before 1990\)"):
        read(path, home)
    assert len(read(path, home, limit=0.5)) == 90


def test_a_file_read_twice_changes_nothing(tmp_path, home):
    once = read(write(tmp_path, events()), home)
    twice = read(write(tmp_path, pl.concat([events(), events()]), "twice.csv"), home, name="log")
    assert once.histories().fingerprint == twice.histories().fingerprint
    assert [(row["reason"], row["rows"]) for row in twice.report.rows] == [("duplicate", 120)]


def test_an_unsorted_log_gives_the_same_histories(tmp_path, home):
    sorted_ = read(write(tmp_path, events()), home)
    shuffled = read(write(tmp_path, events().sample(fraction=1, shuffle=True, seed=1), "shuffled.csv"), home)
    assert sorted_.histories().fingerprint == shuffled.histories().fingerprint


def test_training_never_reaches_past_the_cut(tmp_path, home):
    history = read(write(tmp_path, events()), home).histories(split=(DAY + 300, DAY + 500))
    train, test = history.train, history.test
    assert all(history.timestamps[s:e].max() < DAY + 300 for s, e in zip(train.starts, train.ends, strict=True))
    assert (history.timestamps[test.ends] >= DAY + 500).all() and len(test)


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.rename({"item_id": "track"}), "has no column item_id; of its columns track is not used"),
    (lambda t: t.drop("timestamp"), "has no column timestamp"),
    (lambda t: t.with_columns(timestamp=pl.lit("noon")), "120 × timestamp is neither a number nor an ISO date")])
def test_a_changed_column_stops_with_the_difference(tmp_path, home, change, message):
    with pytest.raises(DataError, match=message):
        read(write(tmp_path, change(events())), home)


def test_reordered_and_further_columns_pass(tmp_path, home):
    plain = read(write(tmp_path, events()), home)
    reordered = events().select("timestamp", pl.lit(1).alias("price"), "item_id", "user_id")
    other = read(write(tmp_path, reordered, "other.csv"), home)
    assert plain.events.equals(other.events)


@pytest.mark.parametrize(("text", "message"), [
    ("", "log.csv is empty"), ("user_id,item_id,timestamp\n", "has no interactions"),
    (f"user_id,item_id,timestamp\na,1,{DAY}\n", "has one interaction only"),
    (f"user_id,item_id,timestamp\na,1,{DAY}\na,2,{DAY}\na,3,{DAY}\n", "has one user only")])
def test_too_little_data_is_a_named_error(tmp_path, home, text, message):
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "log.csv", home).histories()


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_parquet_is_refused_before_anything_is_written(tmp_path, home, damage):
    path = tmp_path / "log.parquet"
    pq.write_table(events().to_arrow(), path, write_page_checksum=True, compression="none", use_dictionary=False)
    assert len(read(path, home)) == 120
    data = bytearray(path.read_bytes())
    where = data.index((DAY + 300).to_bytes(8, "little"))
    data[where] ^= 1
    path.write_bytes(data if damage == "flipped" else data[:-9])
    with pytest.raises(DataError, match=r"log\.parquet cannot be read"):
        read(path, home)
    assert not home.exists()


def test_the_checksum_is_what_refuses_a_flipped_bit(tmp_path, home):
    "The negative control: without page checksums the same flip is read as another time."
    path = tmp_path / "log.parquet"
    pq.write_table(events().to_arrow(), path, write_page_checksum=False, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[data.index((DAY + 300).to_bytes(8, "little"))] ^= 1
    path.write_bytes(data)
    assert read(path, home).events.rows() != events().rows()


def test_a_truncated_gzip_is_refused(tmp_path, home):
    import gzip
    path = tmp_path / "log.txt.gz"
    path.write_bytes(gzip.compress(b"".join(b"u%d i%d\n" % (n % 50, n * n % 997) for n in range(5000)))[:-200])
    with pytest.raises(DataError, match=r"log\.txt\.gz cannot be read"):
        read(path, home)


def test_a_flipped_bit_in_saved_histories_is_found(tmp_path, home):
    folder = read(write(tmp_path, events()), home).histories().save(tmp_path / "histories")
    assert Histories.load(folder, verify=True).n_users == 20
    data = bytearray((folder / "items.npy").read_bytes())
    data[-4] ^= 1
    (folder / "items.npy").write_bytes(data)
    with pytest.raises(DataError, match="was changed"):
        Histories.load(folder, verify=True)
    assert Histories.load(folder).n_users == 20, "the negative control: without verification it is not seen"


def test_a_large_vocabulary_is_no_trouble(tmp_path, home):
    generator = np.random.default_rng(0)
    table = pl.DataFrame({"user_id": np.concatenate([np.arange(60_000)] * 4), "item_id": np.arange(240_000) % 120_000,
                          "timestamp": DAY + generator.integers(0, 10**7, 240_000)})
    history = read(write(tmp_path, table), home).histories()
    assert (history.n_users, history.n_items) == (60_000, 120_000) and len(history.test) == 60_000


def test_a_resumed_epoch_repeats_and_skips_nothing(tmp_path, home):
    split = read(write(tmp_path, events()), home).histories().train

    def batches(): return WindowBatches(split, length=3, batch_size=4, seed=7)
    whole = [tuple(part.numpy().tobytes() for part in batch[:2]) for batch in batches()]
    first, second = batches(), batches()
    iterator = iter(first)
    begun = [tuple(part.numpy().tobytes() for part in next(iterator)[:2]) for _ in range(3)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rest = [tuple(part.numpy().tobytes() for part in batch[:2]) for batch in second]
    assert begun + rest == whole and len(whole) == len(first)


def test_each_target_is_seen_once_an_epoch(tmp_path, home):
    split = read(write(tmp_path, events()), home).histories().train
    seen = np.concatenate([targets.numpy().ravel() for _, targets, *_ in WindowBatches(split, length=2, batch_size=4)])
    wanted = np.concatenate([split.items[s + 1:e] for s, e in zip(split.starts, split.ends, strict=True)])
    assert sorted(seen[seen > 0]) == sorted(wanted)


@pytest.fixture
def fetched(tmp_path):
    "Load a data set into a home of its own; skips, saying why, when it cannot be had."
    def load(name):
        try:
            datasets.fetch(name, tmp_path)
        except DataError as error:
            pytest.skip(str(error))
        return datasets.load(name, home=tmp_path)
    return load


def test_movielens_100k_is_what_it_is_known_to_be(fetched):
    history = fetched("movielens-100k").histories()
    assert (history.n_users, history.n_items, history.n_interactions) == (943, 1682, 100_000)
    assert history.exclude_seen and history.repeat_share == 0


@pytest.mark.parametrize(("name", "counts"), [
    ("movielens-1m", (6040, 3706, 1_000_209)), ("s3rec-lastfm", (1090, 3646, 52_551)),
    ("s3rec-beauty", (22_363, 12_101, 198_502))])
def test_a_mirrored_data_set_is_what_it_is_known_to_be(fetched, mirror, name, counts):
    log = fetched(name)
    history = log.histories()
    assert (history.n_users, history.n_items, history.n_interactions) == counts and history.exclude_seen
    assert name == "s3rec-beauty" or log.catalogue.title(history.item_ids[0]) != history.item_ids[0]


def test_movielens_1m_with_items_seen_five_times(fetched, mirror):
    history = fetched("movielens-1m").histories(min_count=5)
    assert (history.n_users, history.n_items, history.n_interactions) == (6040, 3416, 999_611)


def test_lastfm_2k_quarantines_dates_before_the_site_and_keeps_repeats(fetched, mirror):
    log = fetched("lastfm-2k")
    assert {row["reason"]: row["rows"] for row in log.report.rows} == {
        "timestamp is negative or before 1970": 4, "timestamp is before 1990": 1, "duplicate": 101_463}
    history = log.histories()
    assert history.n_users == 1892 and not history.exclude_seen and history.repeat_share > 0.01


def test_a_fetch_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def half(folder):
        (folder / "part").write_text("half")
        raise DataError("the network went away")
    dataset = datasets.Dataset(about="", licence="", citation="", sources=[half], read=lambda folder: None)
    monkeypatch.setitem(datasets.datasets, "broken", dataset)
    with pytest.raises(DataError, match="went away"):
        datasets.fetch("broken", tmp_path)
    assert not [path for path in (tmp_path / "data").iterdir() if "lock" not in path.name]


def test_a_flipped_byte_in_a_fetched_file_is_refused(fetched, tmp_path):
    fetched("movielens-100k")
    path = tmp_path / "data" / "movielens-100k" / "ml-100k.inter"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"ml-100k\.inter was changed"):
        datasets.load("movielens-100k", home=tmp_path)

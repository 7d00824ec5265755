"""Golden numbers: what the tuned baselines earn on public logs, to the third digit, on any machine."""
import pytest

from workbench.data.datasets import load
from workbench.evaluation.protocol import evaluate
from workbench.models.baselines import fit_popularity
from workbench.training.candidates import NeighbourFitter

MARKOV = {"reach": 1, "power": 0.0, "source": 1.0, "target": 0.0, "backward": 0.25, "length": 1, "decay": 1.0}
KNN_100K = {"reach": 20, "power": 0.5, "source": 0.5, "target": 0.5, "backward": 1.0, "length": 50, "decay": 0.8}
KNN_LASTFM = {"reach": 50, "power": 0.0, "source": 0.25, "target": 0.25, "backward": 0.0, "length": 20, "decay": 0.8}


def earned(model, histories) -> tuple[float, float]:
    report = evaluate(model, histories.test, histories.train, repeats=10)
    return report["ndcg@10"], report["hit_rate@10"]


@pytest.fixture(scope="module")
def movielens():
    return load("movielens-100k").histories()


@pytest.mark.parametrize(
    ("fit", "ndcg", "hits"),
    [(lambda h: fit_popularity(h.train), 0.0432, 0.0838),
     (lambda h: NeighbourFitter(h.train)(**MARKOV), 0.0809, 0.1474),
     (lambda h: NeighbourFitter(h.train)(**KNN_100K), 0.1195, 0.2291)],
    ids=["popularity", "markov", "item_knn"])
def test_baselines_on_movielens_100k(movielens, fit, ndcg, hits):
    "The item-kNN is asked to reach 0.098 here; tuned on validation it has 0.1195 on test."
    assert earned(fit(movielens), movielens) == pytest.approx((ndcg, hits), abs=1.5e-3)


def test_item_knn_on_the_published_lastfm_file(mirror):
    "Asked: 0.0406, above the 0.0390 and HR@10 0.0688 that are published for SASRec."
    histories = load("s3rec-lastfm").histories()
    assert histories.exclude_seen and histories.repeat_share == 0
    assert earned(NeighbourFitter(histories.train)(**KNN_LASTFM), histories) == pytest.approx((0.0429, 0.0853), abs=1.5e-3)


def test_markov_on_movielens_1m(mirror):
    "Asked: 0.112."
    histories = load("movielens-1m").histories()
    assert earned(NeighbourFitter(histories.train)(**MARKOV), histories)[0] == pytest.approx(0.1148, abs=1.5e-3)

"""The ranking service: BentoML starts, restarts and probes the process; workbench.serving.application answers."""
import os
from pathlib import Path

import bentoml

from workbench.errors import ServiceError
from workbench.serving.application import Ranking, create_application
from workbench.settings import settings

HERE = Path(__file__).resolve().parent
if "BENTOML_NO_UDS" in os.environ:
    raise ServiceError("BENTOML_NO_UDS is set, which opens a port that executes what it is sent: unset it")

ranking = Ranking((HERE / "index.html").read_text(encoding="utf8"), settings().serving)


@bentoml.service(
    name="ranking",
    workers=1,
    http={"host": "127.0.0.1", "port": settings().serving.port},
    traffic={"timeout": 30},
    metrics={"enabled": False},  # /metrics is ours: BentoML's makes a series of every path that a scanner asks for
    tracing={"excluded_urls": ".*"},
    logging={"access": {"enabled": False}},
)
@bentoml.asgi_app(create_application(ranking), path="/")
class RankingService:
    "Ranked items from one bundle: WORKBENCH_BUNDLE, or the one inside the Bento."

    def __init__(self) -> None:
        ranking.open_aside(os.environ.get("WORKBENCH_BUNDLE") or HERE / "bundle")

    def __is_ready__(self) -> bool:
        return ranking.ready

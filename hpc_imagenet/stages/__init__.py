"""The stages of a job: `<name>_stage.py` declares a stage, `work/<name>.py` does its work on a node."""

from __future__ import annotations

from hpc_imagenet.stages.download_stage import DOWNLOAD
from hpc_imagenet.stages.evaluate_stage import EVALUATE
from hpc_imagenet.stages.price_stage import PRICE
from hpc_imagenet.stages.process_stage import PROCESS
from hpc_imagenet.stages.search_stage import SEARCH
from hpc_imagenet.stages.session_stage import SESSION
from hpc_imagenet.stages.stage import Stage
from hpc_imagenet.stages.train_stage import TRAIN
from hpc_imagenet.stages.upload_stage import UPLOAD

STAGES: dict[str, Stage] = {
    stage.name: stage for stage in (DOWNLOAD, PROCESS, UPLOAD, TRAIN, EVALUATE, PRICE, SEARCH, SESSION)
}
"""By name; each after those that it needs."""

"""The catalogue: known models, where they come from, and the cache they are kept in."""

from dspark_backend.catalog.files import ModelFiles
from dspark_backend.catalog.home import home
from dspark_backend.catalog.known import KNOWN_MODELS, HubSource, KnownModel, PackagePart
from dspark_backend.catalog.models import ModelStatus, list_models, pull, remove, resolve
from dspark_backend.checkpoint.progress import Progress, ProgressSink, Stage

__all__ = [
    "KNOWN_MODELS",
    "HubSource",
    "KnownModel",
    "ModelFiles",
    "ModelStatus",
    "PackagePart",
    "Progress",
    "ProgressSink",
    "Stage",
    "home",
    "list_models",
    "pull",
    "remove",
    "resolve",
]

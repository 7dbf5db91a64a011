"""CpRec for RecBole: small and fast sequential recommenders. Importing it registers the models."""

from cprec_recbole.config import CompressionConfig, CompressionError
from cprec_recbole.plugin import register

register()

from recbole.quick_start import load_data_and_model, run_recbole  # noqa: E402

from cprec_recbole.compress import compress  # noqa: E402
from cprec_recbole.embedding import BlockEmbedding  # noqa: E402
from cprec_recbole.evaluation import evaluate  # noqa: E402
from cprec_recbole.export import export  # noqa: E402
from cprec_recbole.models import (  # noqa: E402
    CompressedRecommender,
    CpGRU4Rec,
    CpNextItNet,
    CpSASRec,
)
from cprec_recbole.partition import Partition  # noqa: E402
from cprec_recbole.pretrained import load_pretrained  # noqa: E402
from cprec_recbole.quantize import quantize  # noqa: E402
from cprec_recbole.recover import recover  # noqa: E402
from cprec_recbole.running import run  # noqa: E402
from cprec_recbole.softmax import FullSoftmax, TreeSoftmax  # noqa: E402
from cprec_recbole.topk import TopK  # noqa: E402
from cprec_recbole.vocabulary import Vocabulary  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "BlockEmbedding",
    "CompressedRecommender",
    "CompressionConfig",
    "CompressionError",
    "CpGRU4Rec",
    "CpNextItNet",
    "CpSASRec",
    "FullSoftmax",
    "Partition",
    "TopK",
    "TreeSoftmax",
    "Vocabulary",
    "compress",
    "evaluate",
    "export",
    "load_data_and_model",
    "load_pretrained",
    "quantize",
    "recover",
    "run",
    "run_recbole",
]

"""RecJPQ (Petrov and Macdonald, WSDM 2024): an item is m codes, its vector m looked-up pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from recbole.data.dataset import Dataset
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import svds
from torch import Tensor, nn

from cprec_recbole.compare.controls.control import TrainedControl
from cprec_recbole.compare.controls.hashing import table_std
from cprec_recbole.compare.controls.setting import Setting
from cprec_recbole.compare.controls.table import ItemTable, TableRecommender, on_table
from cprec_recbole.costs import BYTES_PER_FLOAT

CENTROIDS = 256  # of each split: a code is a byte
FEWEST_CODES, USUAL_CODES, MOST_CODES = 4, 8, 32  # the paper's are 4 to 16; more where they fit
OPTION = "recjpq_codes"
_NOISE = 1e-5  # against ties, as in the paper; the values are from 0 to 1
_ROWS = 4096


class CodedTable(ItemTable):
    """Item x has the vector `[centroids[0, code_0(x)], ..., centroids[m-1, code_m-1(x)]]`, `[d]`.

    The codes are fixed before training; the centroids are learnt.

    Args:
        codes: m codes of each item id from 0 to 255, `[n_items, m]`; those of padding are unused.
        dim: size `d` of an item vector; a multiple of m.
        std: spread of the entries of a fresh item vector.
    """

    codes: Tensor

    def __init__(self, codes: Tensor, dim: int, std: float) -> None:
        super().__init__(len(codes), dim)
        self.register_buffer("codes", codes.to(torch.uint8))
        m = codes.shape[1]
        self.centroids = nn.Parameter(torch.empty(m, CENTROIDS, dim // m))
        nn.init.normal_(self.centroids, std=std)

    @property
    def extra_bytes(self) -> int:
        """Bytes of the codes: m for each item."""
        return self.codes.nbytes

    def vectors(self, items: Tensor) -> Tensor:
        """See ItemTable.vectors."""
        splits = torch.arange(len(self.centroids), device=items.device)
        return self.centroids[splits, self.codes[items].long()].flatten(-2)

    def logits(self, hidden: Tensor) -> Tensor:
        """See ItemTable.logits: sums of m looked-up products; no item's vector is made."""
        m = len(self.centroids)
        pieces = hidden.view(len(hidden), m, self.dim // m)
        products = torch.einsum("mcs,bms->mcb", self.centroids, pieces).flatten(0, 1)
        rows = self.codes.long() + CENTROIDS * torch.arange(m, device=hidden.device)
        return F.embedding_bag(rows, products, mode="sum").T


class RecJPQ(TrainedControl):
    """RecJPQ with at most the bytes of the compressed model, where that is possible: as many codes
    as fit beside shared layers, and layers of their own where those fit too."""

    def options(self, setting: Setting) -> dict[str, Any]:
        """See Control.options."""
        limit = BYTES_PER_FLOAT * setting.table_limit
        codes = most_codes(setting.n_items, setting.dim, limit)
        whole = setting.uncompressed.as_dict()
        more = setting.sizes(whole).layers - setting.compressed.layers
        table = table_bytes(setting.n_items, setting.dim, codes)
        fits = table + BYTES_PER_FLOAT * more <= limit
        return {**(whole if fits else setting.layers_alone.as_dict()), OPTION: codes}

    def build(self, config: Any, dataset: Any) -> TableRecommender:
        """See TrainedControl.build."""
        spec = config.model_class.spec
        codes = self.codes(dataset, int(config[OPTION]), int(config["seed"]))
        dim, std = spec.dim(int(config[spec.size_option])), table_std(config, dataset)
        return on_table(config, dataset, CodedTable(torch.from_numpy(codes), dim, std))

    def codes(self, dataset: Any, m: int, seed: int) -> np.ndarray:
        """The codes of each item id, `[n_items, m]` of uint8."""
        raise NotImplementedError


class RecJPQRandom(RecJPQ):
    """RecJPQ with random codes, which its authors call a strong control."""

    name = "recjpq-random"
    words = "RecJPQ with random codes: m bytes an item, 256 learnt centroids for each of m splits"

    def codes(self, dataset: Any, m: int, seed: int) -> np.ndarray:
        """See RecJPQ.codes."""
        values = np.random.default_rng(seed).random((int(dataset.item_num), m))
        return binned(values)


class RecJPQSVD(RecJPQ):
    """RecJPQ with codes out of a truncated SVD of the user-item matrix, as in the paper."""

    name = "recjpq-svd"
    words = "RecJPQ with codes out of a truncated SVD of the training interactions"

    def codes(self, dataset: Any, m: int, seed: int) -> np.ndarray:
        """See RecJPQ.codes."""
        return svd_codes(user_item_matrix(dataset), m, np.random.default_rng(seed))


def most_codes(n_items: int, dim: int, limit: int) -> int:
    """The most codes m, from 4 to 32 and a divisor of `dim`, whose table fits into so many bytes.

    Centroids take `256 d` floats whatever m is. Where they do not fit themselves there is no such
    table, and 8 codes are taken, or what comes nearest: the size is told, not hidden.
    """
    divisors = [m for m in range(min(dim, MOST_CODES), 0, -1) if dim % m == 0]
    possible = [m for m in divisors if m >= FEWEST_CODES] or divisors
    usual = min(possible, key=lambda m: abs(m - USUAL_CODES))
    return next((m for m in possible if table_bytes(n_items, dim, m) <= limit), usual)


def table_bytes(n_items: int, dim: int, m: int) -> int:
    """Bytes of a table of m codes an item and its centroids."""
    return m * n_items + BYTES_PER_FLOAT * CENTROIDS * dim


def svd_codes(matrix: csr_matrix, m: int, generator: np.random.Generator) -> np.ndarray:
    """Codes out of the m strongest right singular vectors, `[users, n_items] -> [n_items, m]`.

    Each direction is brought to values from 0 to 1, a little noise is added against ties, and the
    items are cut into 256 bins of equal count. Directions that the matrix does not have are random.
    """
    n_items = matrix.shape[1]
    rank = min(m, min(matrix.shape) - 1)
    start = generator.standard_normal(min(matrix.shape))
    _, strengths, directions = svds(matrix.astype(np.float64), k=rank, v0=start)
    values = directions[np.argsort(-strengths)].T  # [n_items, rank]
    low, high = values.min(0), values.max(0)
    values = (values - low) / np.where(high > low, high - low, 1.0)
    values = values + generator.normal(0.0, _NOISE, values.shape)
    return binned(np.hstack([values, generator.random((n_items, m - rank))]))


def binned(values: np.ndarray) -> np.ndarray:
    """The bin of each item in each column, 256 bins of equal count, `[n_items, m]` of uint8; the
    padding item is in no bin and gets 0."""
    codes = np.zeros(values.shape, dtype=np.uint8)
    places = values[1:].argsort(0, kind="stable").argsort(0, kind="stable")
    codes[1:] = places * CENTROIDS // (len(values) - 1)
    return codes


def user_item_matrix(dataset: Dataset) -> csr_matrix:
    """Which user has which item in training, ones in `[users, n_items]`; users in no order."""
    matrix = dataset.inter_matrix("csr")
    matrix.data[:] = 1.0
    return matrix

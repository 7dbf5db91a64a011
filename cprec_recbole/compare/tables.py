"""Item tables that are no blocks: quotient-remainder hashing and RecJPQ, and models on them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import svds
from sklearn.cluster import KMeans
from torch import Tensor, nn

from cprec_recbole.costs import BYTES_PER_FLOAT, saved_bytes
from cprec_recbole.data.sequences import item_counts
from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.losses import LogitBlock
from cprec_recbole.models.from_config import compression_of
from cprec_recbole.models.recommender import CompressedRecommender
from cprec_recbole.models.saving import packed_blocks
from cprec_recbole.models.spec import Parts
from cprec_recbole.partition import PADDING, Partition

CENTROIDS = 256  # of each split: a code is a byte
_FEWEST_CODES, _USUAL_CODES, _MOST_CODES = 4, 8, 32  # the paper's are 4 to 16; more where they fit
_SAMPLE, _ROUNDS = 2**16, 25  # items and rounds of k-means that centroids are found with
_NOISE = 1e-5  # against ties, as in the paper; the values are from 0 to 1


class ItemTable(nn.Module, ABC):
    """Vectors of all items, padding included, kept in another way than as rows: `[n_items, d]` in
    id order. Stands where a BlockEmbedding stands, as the only block of itself. The padding item's
    vector is zero."""

    quantized = None
    projection = None

    def __init__(self, n_items: int, dim: int) -> None:
        super().__init__()
        self.partition = Partition(torch.arange(n_items), (n_items,))  # positions are ids
        self.partition.register_buffer("item_at", self.partition.item_at, persistent=False)
        self.n_items, self.dim = n_items, dim  # padding included
        self.blocks = [self]  # as a softmax reads it: of `rows` and so on see Block

    @abstractmethod
    def _vectors(self, items: Tensor) -> Tensor:
        """Vectors of item ids, `[...] -> [..., d]`; that of padding is not looked at."""

    @abstractmethod
    def _products(self, hidden: Tensor) -> Tensor:
        """Products with every item, `[B, d] -> [B, n_items]`; that of padding is not looked at."""

    def forward(self, items: Tensor) -> Tensor:
        """Vectors of item ids, `[...] -> [..., d]`; IndexError outside the catalogue."""
        vectors = self._vectors(self.partition.positions(items))
        return vectors.masked_fill((items == PADDING).unsqueeze(-1), 0.0)

    def dense(self) -> Tensor:
        """The whole table, `[n_items, d]`."""
        return self(torch.arange(self.n_items, device=self.partition.item_at.device))

    def norm(self) -> Tensor:
        """Frobenius norm of the whole table, `[]`."""
        return torch.linalg.vector_norm(self.dense())

    def rows(self) -> Tensor:
        """See Block.rows."""
        return self.dense().detach()

    def logits(self, hidden: Tensor) -> Tensor:
        """See Block.logits."""
        return F.pad(self._products(hidden)[:, 1:], (1, 0))

    def logit_block(self, hidden: Tensor) -> LogitBlock:
        """See Block.logit_block. Of the vectors of all items, made for the step: on a processor
        many times faster than sums of looked-up products with their gradients."""
        return LogitBlock(hidden, self.dense())


class HashedTable(ItemTable):
    """Quotient-remainder hashing (Shi et al., KDD 2020): with the divisor q, item x has the vector
    `quotients[x // q] * remainders[x % q]`, `[d]`, whose entries have the spread `std` at first."""

    def __init__(self, n_items: int, dim: int, divisor: int, std: float) -> None:
        super().__init__(n_items, dim)
        self.divisor = divisor
        self.quotients = nn.Parameter(torch.empty(-(-n_items // divisor), dim))
        self.remainders = nn.Parameter(torch.empty(divisor, dim))
        for rows in (self.quotients, self.remainders):
            nn.init.normal_(rows, std=math.sqrt(std))  # so that products have a spread of std

    def _vectors(self, items: Tensor) -> Tensor:
        return self.quotients[items // self.divisor] * self.remainders[items % self.divisor]

    def _products(self, hidden: Tensor) -> Tensor:
        weighed = hidden.unsqueeze(1) * self.quotients  # once each, [B, quotients, d]
        return (weighed @ self.remainders.T).flatten(1)[:, : self.n_items]


class CodedTable(ItemTable):
    """RecJPQ (Petrov and Macdonald, WSDM 2024): item x has the vector
    `[centroids[0, code_0(x)], ..., centroids[m-1, code_m-1(x)]]`, `[d]`, whose entries have the
    spread `std` at first. The codes, `[n_items, m]` from 0 to 255, are fixed before training; the
    centroids are learnt, from those given, `[m, 256, d / m]`, or from random ones."""

    codes: Tensor

    def __init__(
        self, codes: Tensor, dim: int, std: float, centroids: Tensor | None = None
    ) -> None:
        super().__init__(len(codes), dim)
        self.register_buffer("codes", codes)
        m = codes.shape[1]
        random = torch.randn(m, CENTROIDS, dim // m)
        self.centroids = nn.Parameter(std * (random if centroids is None else centroids))

    def _vectors(self, items: Tensor) -> Tensor:
        splits = torch.arange(len(self.centroids), device=items.device)
        return self.centroids[splits, self.codes[items].long()].flatten(-2)

    def _products(self, hidden: Tensor) -> Tensor:
        # sums of m looked-up products: no item's vector is made
        m = len(self.centroids)
        pieces = hidden.view(len(hidden), m, self.dim // m)
        products = torch.einsum("mcs,bms->mcb", self.centroids, pieces).flatten(0, 1)
        rows = self.codes.long() + CENTROIDS * torch.arange(m, device=hidden.device)
        return F.embedding_bag(rows, products, mode="sum").T


def model_on_table(
    kind: str, options: Mapping[str, Any], config: Any, dataset: Any
) -> CompressedRecommender:
    """A fresh model as RecBole would build it from the config of a Cp model and the training split,
    on another item table: `hashing` with the option `hashing_divisor`, `recjpq-random`,
    `recjpq-svd` or `recjpq-hc` with `recjpq_codes`. It is there to be measured, and cannot be
    saved."""
    spec, compression = config.model_class.spec, compression_of(config)
    n_items, dim = int(dataset.item_num), spec.dim(int(config[spec.size_option]))
    with torch.random.fork_rng(devices=[]):
        std = spec.table_std(spec.build_inner(config, dataset), n_items)
    if kind == "hashing":
        table: ItemTable = HashedTable(n_items, dim, int(options["hashing_divisor"]), std)
    else:
        m, generator = int(options["recjpq_codes"]), np.random.default_rng(int(config["seed"]))
        centroids = None
        if kind == "recjpq-random":
            codes = binned(generator.random((n_items, m)))
        elif kind == "recjpq-svd":
            codes = svd_codes(user_item_matrix(dataset), m, generator)
        else:
            codes, started = quantised_codes(user_item_matrix(dataset), dim, m, generator)
            centroids = torch.from_numpy(started).float()
        table = CodedTable(torch.from_numpy(codes), dim, std, centroids)
    inner = spec.build_inner(config, dataset)
    inner.n_items = n_items
    blocks = cast(BlockEmbedding, table)
    last_column = spec.reads_last_column and compression.training == "last_position"
    parts = Parts(inner, blocks, blocks, compression, last_column, item_counts(dataset))
    model = config.model_class(parts=parts)
    model.item_tokens = dataset.field2id_token[dataset.iid_field]
    return model.to(config["device"])


def served_bytes(model: nn.Module) -> int:
    """Bytes that scoring needs: parameters, an item's codes, and the block of each item in as few
    bits as that takes. Not the names of items."""
    total = saved_bytes(model)
    if isinstance(model, CompressedRecommender):
        partition = model.table.partition
        member = partition.blocks(partition.position_of).cpu().numpy()
        total += packed_blocks(member, len(partition.sizes)).nbytes
        total += sum(codes.nbytes for codes in model.table.buffers(recurse=False))
    return total


def largest_divisor(n_items: int, rows: int) -> int:
    """The largest q whose two tables have at most so many rows; that of the fewest rows where none
    has. A larger q means fewer items to a remainder."""
    for divisor in range(min(n_items, rows), 0, -1):
        if divisor + -(-n_items // divisor) <= rows:
            return divisor
    return max(1, math.isqrt(n_items))


def most_codes(n_items: int, dim: int, limit: int) -> int:
    """The most codes m, from 4 to 32 and a divisor of `dim`, whose table fits into so many bytes.
    Centroids take `256 d` floats whatever m is; where they do not fit themselves 8 codes are taken,
    or what comes nearest: the size is told, not hidden."""
    divisors = [m for m in range(min(dim, _MOST_CODES), 0, -1) if dim % m == 0]
    possible = [m for m in divisors if m >= _FEWEST_CODES] or divisors
    usual = min(possible, key=lambda m: abs(m - _USUAL_CODES))
    return next((m for m in possible if coded_bytes(n_items, dim, m) <= limit), usual)


def coded_bytes(n_items: int, dim: int, m: int) -> int:
    """Bytes of a table of m codes an item and its centroids."""
    return m * n_items + BYTES_PER_FLOAT * CENTROIDS * dim


def svd_codes(matrix: csr_matrix, m: int, generator: np.random.Generator) -> np.ndarray:
    """Codes out of the m strongest right singular vectors, `[users, n_items] -> [n_items, m]`: each
    is brought to values from 0 to 1, a little noise is added against ties, and the items are cut
    into 256 bins of equal count. Directions that the matrix does not have are random."""
    n_items, values = matrix.shape[1], _directions(matrix, m, generator)
    rank = values.shape[1]
    low, high = values.min(0), values.max(0)
    values = (values - low) / np.where(high > low, high - low, 1.0)
    values = values + generator.normal(0.0, _NOISE, values.shape)
    return binned(np.hstack([values, generator.random((n_items, m - rank))]))


def quantised_codes(
    matrix: csr_matrix, dim: int, m: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Codes of RecJPQ-HC and the centroids that it starts from, `[users, n_items] -> [n_items, m],
    [m, 256, d / m]`: product quantisation of the d strongest right singular vectors, each with a
    spread of one. Directions that the matrix does not have, and centroids that no item needs, are
    random."""
    n_items, values = matrix.shape[1], _directions(matrix, dim, generator)
    values = np.hstack([values, generator.standard_normal((n_items, dim - values.shape[1]))])[1:]
    spread = values.std(0)
    values = (values - values.mean(0)) / np.where(spread > 0, spread, 1.0)
    codes = np.zeros((n_items, m), dtype=np.uint8)
    centroids = generator.standard_normal((m, CENTROIDS, dim // m))
    sample = generator.permutation(len(values))[:_SAMPLE]
    for j, part in enumerate(np.split(values.astype(np.float32), m, axis=1)):
        means = KMeans(
            n_clusters=min(CENTROIDS, len(np.unique(part[sample], axis=0))),
            max_iter=_ROUNDS,
            random_state=int(generator.integers(2**31)),
        ).fit(part[sample])
        codes[1:, j] = means.predict(part)
        centroids[j, : means.n_clusters] = means.cluster_centers_
    return codes, centroids


def _directions(matrix: csr_matrix, rank: int, generator: np.random.Generator) -> np.ndarray:
    """The strongest right singular vectors, strongest first, `[users, n_items] -> [n_items, rank]`,
    or as many as there are."""
    rank = min(rank, min(matrix.shape) - 1)
    start = generator.standard_normal(min(matrix.shape))
    _, strengths, directions = svds(matrix.astype(np.float64), k=rank, v0=start)
    return directions[np.argsort(-strengths)].T


def binned(values: np.ndarray) -> np.ndarray:
    """The bin of each item in each column, 256 bins of equal count, `[n_items, m]` of uint8; the
    padding item is in no bin and gets 0."""
    codes = np.zeros(values.shape, dtype=np.uint8)
    places = values[1:].argsort(0, kind="stable").argsort(0, kind="stable")
    codes[1:] = places * CENTROIDS // (len(values) - 1)
    return codes


def user_item_matrix(dataset: Any) -> csr_matrix:
    """Which user has which item in training, ones in `[users, n_items]`; users in no order."""
    matrix = dataset.inter_matrix("csr")
    matrix.data[:] = 1.0
    return matrix

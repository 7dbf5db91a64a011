"""The compressed models: RecBole's, each a record and what all have in common."""

from __future__ import annotations

from cprec_recbole import records
from cprec_recbole.recommender import CompressedRecommender


class CpNextItNet(CompressedRecommender):
    """NextItNet (WSDM 2019), compressed."""

    record = records.NEXTITNET


class CpSASRec(CompressedRecommender):
    """SASRec (ICDM 2018), compressed."""

    record = records.SASREC


class CpGRU4Rec(CompressedRecommender):
    """GRU4Rec (DLRS 2016), compressed."""

    record = records.GRU4REC


class CpBERT4Rec(CompressedRecommender):
    """BERT4Rec (CIKM 2019), compressed."""

    record = records.BERT4REC


class CpLightSANs(CompressedRecommender):
    """LightSANs (SIGIR 2021), compressed."""

    record = records.LIGHTSANS


class CpGCSAN(CompressedRecommender):
    """GC-SAN (IJCAI 2019), compressed."""

    record = records.GCSAN


class CpNARM(CompressedRecommender):
    """NARM (CIKM 2017), compressed."""

    record = records.NARM


class CpSTAMP(CompressedRecommender):
    """STAMP (KDD 2018), compressed."""

    record = records.STAMP


class CpSRGNN(CompressedRecommender):
    """SR-GNN (AAAI 2019), compressed."""

    record = records.SRGNN


class CpSINE(CompressedRecommender):
    """SINE (WSDM 2021), compressed."""

    record = records.SINE


MODELS: list[type[CompressedRecommender]] = [
    *(CpNextItNet, CpSASRec, CpGRU4Rec, CpBERT4Rec, CpLightSANs),
    *(CpGCSAN, CpNARM, CpSTAMP, CpSRGNN, CpSINE),
]

"""What each instruction costs for one token at one linear of width h, and what makes it cheap or dear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cost:
    """flops: of one token; elements: of one adapter; when: what to know of it. docs/adapters.md shows them."""

    flops: str
    elements: str
    when: str


COSTS: Mapping[str, Cost] = {
    "LowRank": Cost(
        "4hr", "2hr", "kernels of its own, one launch for all programs; what everything of small rank becomes"
    ),
    "TokenLowRank": Cost("2hr", "r(V + h)", "a gather and one product; V: the vocabulary"),
    "AddOut": Cost("h", "h", "in the low-rank kernel"),
    "SharedLowRank": Cost("4hr", "h + r", "the two matrices lie in the arena once for all adapters that have them"),
    "ExpertLowRank": Cost(
        "4hrk", "2hrE", "k of E experts; the site's adapted rows are sorted by expert: a synchronisation"
    ),
    "RouterLowRank": Cost(
        "2hE(r + 1)", "r(h + E)", "the router's matrix for each segment, and its own forward again over those rows"
    ),
    "ScaleIn": Cost("h", "h", "one multiplication for all programs, on a copy of the input"),
    "ScaleOut": Cost("h", "h", "one multiplication for all programs"),
    "Dense": Cost(
        "2h^2", "h^2", "as dear as the base's own linear, in time and memory: only where nothing smaller is exact"
    ),
    "OutputRows": Cost("2hn", "hn", "n rows of the head"),
    "InputBottleneck": Cost("4hr", "2hr", "before the base reads"),
    "OutputBottleneck": Cost("4hr", "2hr", "after the base"),
    "ParallelBottleneck": Cost("4hr", "2hr", "beside the base"),
    "BlockBottleneck": Cost("4hr", "2hr", "once for a whole block, not for each of its linears"),
    "Intervention": Cost("4hr", "2hr", "on the first and last tokens of prompts only; nothing in decode"),
    "NormOverride": Cost("a second norm", "h", "the rows are normed twice"),
    "KvPrefix": Cost("4Th", "2Th", "T slots that every later token attends to; copied once for a sequence"),
    "GatedPrefix": Cost("4Th", "2Th", "a softmax of its own beside attention"),
    "SoftPrompt": Cost("T tokens more", "Th", "T virtual tokens are prefilled and stay in the pages"),
    "TokenRows": Cost("0", "nh", "a look-up for each token"),
    "TokenRotate": Cost("2hb", "hb", "blocks of b, on the embedding's rows"),
    "ModulatedRows": Cost("2hr", "r(V + h)", "a gather and one product, times the row"),
    "Kron": Cost("4h^1.5", "2h", "for two square factors; never unfolded, full rank"),
    "BlockRotateIn": Cost("2hb", "hb", "blocks of b; the base reads another input for these rows"),
    "ButterflyIn": Cost("2hbm", "hbm", "m stages of blocks of b"),
    "PairRotateOut": Cost("3h", "2h", "element-wise"),
    "Sparse": Cost("2n", "2n", "n entries, gathered: bound by memory, not by arithmetic"),
    "FourierSparse": Cost("2n + 10h log h", "3n", "n coefficients; two transforms, far below a dense product"),
    "WaveletSparse": Cost("2n + 10h", "3n", "n coefficients; two one-level transforms"),
    "BlockCirculant": Cost("2h^2/b + 10h log b", "h^2/b", "blocks of b by Fourier transforms"),
}

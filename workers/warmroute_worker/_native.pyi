"""The worker's Rust: collectives of ranks on one host (`workers/rank_comm`), and kernels (`workers/cpu_kernels`).

Vectors are given by address and size in bytes: they must be contiguous and must not be used by anybody else during the
call. A call returns when its operation is done; the GIL is free meanwhile.
"""

from collections.abc import Sequence
from typing import TypeAlias, final

__all__ = [
    "CollectiveError",
    "Decoder",
    "Group",
    "Layer",
    "Matrix",
    "Region",
    "add_and_norm",
    "attend",
    "likeliest",
    "norm_heads",
    "products_are_fast",
    "rotate",
    "rows_of",
    "silu_and_multiply",
    "store",
]

_GroupPlan: TypeAlias = tuple[str, Sequence[int], int, int]
"""Name, ranks, slots of each rank (2, 4, 8 or 16), bytes of a slot (a multiple of 64)."""

class CollectiveError(RuntimeError):
    """The ranks have stopped, or stop now; the message is one line that says why."""

@final
class Region:
    """A mapping of the memory that all ranks share."""

    def __new__(cls, fd: int, ranks: int, groups: Sequence[_GroupPlan]) -> Region:
        """Maps what `memory_file` made for the same ranks and groups. `fd` stays the caller's. Raises OSError."""

    @staticmethod
    def memory_file(ranks: int, groups: Sequence[_GroupPlan]) -> int:
        """A descriptor, inherited by children, of new memory: zero, without a name, gone with its last user."""

    def abort(self, text: str) -> None:
        """Every collective, also those that wait already, ends with this text; of several callers the first counts."""

    def aborted(self) -> str | None:
        """Why the ranks stop, if they do."""

    def status(self, rank: int) -> dict[str, int]:
        """What a rank says of itself: pid, heartbeat, steps, busy_ns, comm_ns, weight_bytes, pool_bytes, slot_bytes,
        active_ns, prefill_steps, decode_steps, idle_steps, stored_bytes, sent_rows, expert_rows, overlap_ns,
        moved_experts, balancedness_ppm, node_bytes; of each operation the number of calls and the bytes given to
        it (`all_reduce_calls`, `all_reduce_bytes` ...)."""

    def status_words(self, rank: int) -> list[int]:
        """All that `status` says, for a region of the same layout on another host."""

    def set_status_words(self, rank: int, words: list[int]) -> None:
        """What `status_words` gave there. Only for ranks that are not on this host."""

    def get(self, rank: int, counter: str) -> int:
        """One of the numbers of `status`, without the operations."""

    def set(self, rank: int, counter: str, value: int) -> None:
        """By the rank itself only."""

    def add(self, rank: int, counter: str, value: int) -> None:
        """By the rank itself only."""

    def group(self, index: int, rank: int, spin_us: int, deadline: float, two_stage_from: int | None) -> Group:
        """`rank`'s end of the group at `index`, in which it is awake for `spin_us` before it sleeps, and gives up on
        others after `deadline` seconds. Vectors of `two_stage_from` bytes and more are summed in two stages."""

@final
class Group:
    """Members are numbered by their place in the group. All must call the same operations in the same order.

    All methods raise CollectiveError.
    """

    def all_reduce(self, address: int, num_bytes: int, dtype: str) -> None:
        """The vector becomes the sum of all members', taken in their order: the same bits everywhere.
        `dtype`: float32, bfloat16 or float16."""

    def gather(self, address: int, sizes: Sequence[int], place: int, root: int | None, out: int | None) -> None:
        """At `root` (None: everywhere) `out` gets the parts of all members, of `sizes[member]` bytes. `place`: ours."""

    def reduce_scatter(self, address: int, num_bytes: int, wanted: tuple[int, int], dtype: str) -> None:
        """Bytes `wanted[0]` to `wanted[1]` of the vector become the sum of all members'; the others stay."""

    def exchange(
        self, kind: str, address: int, sizes: Sequence[int], place: int, wanted: Sequence[tuple[int, int]], out: int
    ) -> None:
        """Each member shows `sizes[member]` bytes; `out` gets bytes `wanted[member]` of each, one after the other.
        `kind`: gather or all_to_all, as which it is counted. `place`: ours."""

    def broadcast(self, address: int, num_bytes: int, root: int) -> None:
        """The vector becomes what it is at `root`."""

    def message(self, message: bytes | None, root: int) -> bytes:
        """What `root` gives; None elsewhere, where this waits as long as it takes."""

    def barrier(self) -> None:
        """Returns when all members have called it."""

# ---- kernels: float32 on CPU. Addresses of tensors; sizes in numbers, not bytes.

def add_and_norm(x: int, delta: int, weight: int, out: int, rows: int, width: int, eps: float) -> None:
    """x += delta (0: nothing to add); out = x / sqrt(mean(x^2) + eps) * weight, of [rows, width]."""

def norm_heads(x: int, rows: int, stride: int, heads: int, weight: int, width: int, eps: float) -> None:
    """The same norm of each of the first `heads` heads of each row, in place."""

def rotate(x: int, rows: int, stride: int, heads: int, dim: int, cos: int, sin: int) -> None:
    """Turn the first `heads` heads of each row, in place; `cos` and signed `sin` are [rows, dim]."""

def store(x: int, rows: int, stride: int, width: int, slots: int, pool: int, pool_slots: int) -> None:
    """pool[slots[i]] = the first `width` numbers of row i; `slots`: int64, `pool`: [pool_slots, width]."""

def rows_of(weight: int, rows: int, width: int, first: int, ids: int, count: int, out: int, bfloat16: bool) -> None:
    """out[i] = weight[ids[i] - first], zeros where there is no such row; `ids`: `count` int64; `weight` may be
    bfloat16."""

def likeliest(logits: int, rows: int, width: int, out: object) -> None:
    """out[i] (an int64 array) = where in row i the largest number stands, the first of equal ones, or the first
    NaN."""

def silu_and_multiply(x: int, out: int, rows: int, width: int) -> None:
    """[rows, 2 * width] -> [rows, width]"""

@final
class Matrix:
    """A copy of a matrix, [outputs, inputs], and of a bias (0: none), in the order that products read it in."""

    def __new__(cls, weight: int, outputs: int, inputs: int, bias: int, bfloat16: bool) -> Matrix:
        """A weight of 16 bits is kept so, and multiplied as the same numbers in 32 would be."""

    def multiply(self, x: int, rows: int, out: int, threads: int) -> None:
        """[rows, inputs] -> [rows, outputs]. The bits of a row do not depend on the others."""

@final
class Layer:
    """Pre-norm attention with rotary positions, then a gated MLP, for tokens that decode."""

    def __new__(
        cls,
        matrices: Sequence[Matrix],
        norms: tuple[Sequence[float], Sequence[float]],
        head_norms: tuple[Sequence[float], Sequence[float]] | None,
        eps: float,
        scale: float,
        heads: tuple[int, int, int],
    ) -> Layer:
        """`matrices`: to queries, keys and values; from what heads have seen; to gate and up; from the inner numbers.
        `norms`: weights, before the attention and before the MLP. `head_norms`: of queries and of keys. `heads`: of
        queries, of keys, and the numbers of one."""

@final
class Decoder:
    """A stage's layers, with what stands before and behind them."""

    def __new__(
        cls,
        layers: Sequence[Layer],
        hidden: int,
        embedding: tuple[int, int, int, bool] | None,
        end: tuple[Sequence[float], float, Matrix, Sequence[int]] | None,
        turns: tuple[int, int, int],
        table: tuple[int, int, int],
        page_size: int,
        pool: tuple[int, int],
    ) -> Decoder:
        """All addresses stay the caller's, and valid. `embedding`: address, rows, number of the first, whether it is
        bfloat16. `end`: weight and epsilon of the last norm, the head, and how many logits each rank makes. `turns`:
        cos and signed sin, [positions, numbers of a head], and how many positions. `table`: page table (int64), rows,
        columns. `pool`: [layers, 2, slots, KV heads, numbers of a head], and how many numbers."""

    def decode(
        self,
        ids: object,
        rows: object,
        starts: object,
        x: int,
        out: int | None,
        threads: int,
        group: Group | None,
    ) -> None:
        """One token of each sequence: `ids` (int64), its row in the page table and how many tokens of it are stored
        (int32); arrays. `x`: [tokens, hidden], what the stage begins with if it does not embed, and what comes out of
        it. `out`: [tokens, logits of all ranks], where they are made and wanted. `group`: adds up what the ranks have.
        Raises CollectiveError, ValueError."""

    def decode_on(
        self,
        ids: object,
        rows: object,
        starts: object,
        stop_ids: object,
        steps: int,
        seconds: float,
        x: int,
        threads: int,
        group: Group | None,
        messages: int | None,
    ) -> list[int]:
        """`steps` such steps, each with the likeliest tokens of the one before; fewer if one of these is among
        `stop_ids` (an int64 array), or the next one would end more than `seconds` after the first began, or there is
        something to read at the descriptor `messages`, which one rank may have. All ranks do as many. The tokens of
        all steps, one step behind the other. Only where this embeds and makes logits."""

def products_are_fast() -> bool:
    """Whether this CPU has what `Matrix` is made for."""

def attend(
    queries: tuple[int, int, int, int],
    pool: tuple[int, int, int, int, int, int, int, int],
    table: tuple[int, int, int],
    rows: int,
    visible: int,
    scale: float,
    out: int,
    threads: int,
) -> None:
    """Single queries over pages. `queries`: address, tokens, stride, heads. `pool`: addresses of keys and of values,
    slots, KV heads, numbers of a key, from value to value, of a value; tokens of a page. `table`: page table (int64),
    rows, columns. `rows`, `visible`: int64 per query, its row in the table and how many tokens it sees. `out`: [tokens,
    heads, numbers of a value]."""

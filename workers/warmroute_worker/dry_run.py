"""What `--dry-run` prints: the processes a command would start, and which rank does what. Starts nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from warmroute_worker import model_config, model_folder
from warmroute_worker.startup_error import StartupError

if TYPE_CHECKING:
    from warmroute_worker.args import WorkerArgs
    from warmroute_worker.topology import Nodes


def describe(args: WorkerArgs) -> list[str]:
    """Lines for the operator. What is wrong with the model, if it is at hand, is one of them."""
    layout = args.layout
    sizes = f"ranks: {layout.world_size}, schedulers: {layout.dp_size}"
    lines = [f"{args.model_path}: {str(layout) or 'not divided'}; {sizes}"]
    lines += args.remarks()
    first = args.node_rank == 0
    lines.append("processes of this node:" if args.nnodes > 1 else "processes:")
    lines.append("  supervisor")
    if first:
        lines.append(f"  HTTP and tokenizer on http://{args.host}:{args.port}")
    lines.append(
        f"  engine: {len(args.nodes.local_ranks)} ranks" + (", their parent" if len(args.nodes.local_ranks) > 1 else "")
    )
    lines.append("ranks:")
    lines += rank_map(args.nodes)
    try:
        config = model_config.read(model_folder.resolve(args.model_path))
        model_config.check_layout(config, layout)
        model_config.check_compiled(config, args.enable_torch_compile)
        lines[1:1] = model_config.remarks(config, layout)
    except (LookupError, StartupError) as error:
        lines.append(f"this would not start: {error}")
    return lines


def rank_map(nodes: Nodes) -> list[str]:
    """One line per rank: its coordinates, its node, and whether it schedules."""
    header = ["rank", "pp", "tp", "dp", "attention tp", "ep", "expert tp"] + (["node"] if nodes.count > 1 else [])
    rows = [[*header, "does"]]
    for place in nodes.layout.places():
        numbers = [place.rank, place.pp_rank, place.tp_rank, place.dp_rank, place.attention_tp_rank]
        numbers += [place.ep_rank, place.expert_tp_rank] + ([nodes.node_of(place.rank)] if nodes.count > 1 else [])
        does = ["schedules"] * place.is_driver + ["draws tokens"] * place.samples
        rows.append([*map(str, numbers), ", ".join(does)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]

"""Imports point downwards only, in both distributions. Read from the source, so that nothing needs to be importable."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A module may import from its own layer and from those below. Longest matching prefix counts.
ROUTER_LAYERS = [
    {
        "warmroute.launch_router",
        "warmroute.launch_server",
        "warmroute.launch_dry_run",
        "warmroute.worker_processes",
        "warmroute.worker_plan",
    },
    {"warmroute.app"},
    {"warmroute.supervisor", "warmroute.one_process", "warmroute.data_process"},
    {"warmroute.control", "warmroute.dataplane", "warmroute.request_search", "warmroute.shared"},
    {"warmroute.reexecution", "warmroute.startup"},
    {"warmroute.children", "warmroute.child_task", "warmroute.channel", "warmroute.engine", "warmroute.listening"},
    {
        "warmroute.retry",
        "warmroute.restarts",
        "warmroute.process",
        "warmroute.service_manager",
        "warmroute.directory_board",
        "warmroute.router_health",
        "warmroute.command_line",
        "warmroute.refused_flags",
        "warmroute.directory",
        "warmroute.config",
        "warmroute.errors",
    },
    {"warmroute._core", "warmroute"},
]
# Siblings of one layer that must not know each other.
APART = [("warmroute.control", "warmroute.dataplane"), ("warmroute.dataplane", "warmroute.control")]

# Outside of its directory, a library has one place. aiohttp on the hot path would cost five times as much per request.
CONFINED = {
    "aiohttp": ["warmroute.control"],
    "prometheus_client": ["warmroute.control"],
    "uvloop": ["warmroute.app", "warmroute.data_process", "warmroute.launch_server"],
    "httpx": ["warmroute.control", "warmroute.worker_processes"],
}


def modules(top: str, package: str) -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / top / package).rglob("*.py")):
        parts = path.relative_to(ROOT / top).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path: Path) -> set[str]:
    """Every module a file imports, wherever in it; `from a import b` counts as `a` and `a.b`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def layer(module: str) -> int:
    matches = [(len(p), i) for i, prefixes in enumerate(ROUTER_LAYERS) for p in prefixes if within(module, p)]
    return max(matches)[1]


ROUTER = list(modules("python", "warmroute"))
WORKER = list(modules("workers", "warmroute_worker"))


@pytest.mark.parametrize(("module", "path"), ROUTER, ids=[module for module, _ in ROUTER])
def test_router(module: str, path: Path) -> None:
    own = layer(module)
    known = {name for name, _ in ROUTER} | {"warmroute._core"}
    for imported in imports(path):
        assert not within(imported, "warmroute_worker"), f"{module} imports the worker: {imported}"
        assert not within(imported, "torch"), f"{module} imports torch"
        if imported in known and imported != "warmroute":
            assert layer(imported) >= own, f"{module} imports {imported} from a layer above"
        for one, other in APART:
            assert not (within(module, one) and within(imported, other)), f"{module} imports {imported}"
        for library, places in CONFINED.items():
            if within(imported, library):
                assert any(within(module, place) for place in places), f"{module} imports {library}"


@pytest.mark.parametrize("module", [module for module, _ in ROUTER])
def test_every_router_module_has_a_layer(module: str) -> None:
    prefixes = set().union(*ROUTER_LAYERS) - {"warmroute"}
    assert module == "warmroute" or any(within(module, prefix) for prefix in prefixes), f"{module}: name its layer"


def closure(start: str) -> set[str]:
    """Everything that importing a worker module brings along from its own distribution, and what those import."""
    paths = dict(WORKER)
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        parents = [module.rsplit(".", depth)[0] for depth in range(1, module.count(".") + 1)]
        if module in paths:
            waiting += [name for name in imports_at_load(paths[module]) if name.split(".")[0] != "__future__"]
        waiting += [parent for parent in parents if parent in paths]
    return seen


def imports_at_load(path: Path) -> set[str]:
    """As `imports`, without those inside of functions and under `if TYPE_CHECKING`."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        waiting += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize(("module", "path"), WORKER, ids=[module for module, _ in WORKER])
def test_worker(module: str, path: Path) -> None:
    for imported in imports(path):
        assert not within(imported, "warmroute"), f"{module} imports the router: {imported}"
        assert not within(imported, "transformers"), f"{module} imports transformers"


# From the command line down to the kernels; a module may import from its own part and from those behind it.
WORKER_PARTS = [
    "launch_worker",
    "supervisor",
    "http",
    "engine_process",
    "offline",
    "offline_drivers",
    "rank_process",
    "driver",
    "engine",
    "scheduler",
    "executor",
    "models",
    "layers",
    "comm",
    "topology",
]
# Only these may bring torch along. Arguments, messages, scheduler and KV bookkeeping are importable without it, and the
# processes of HTTP and of the supervisor never load it.
WITH_TORCH = [
    "offline",
    "offline_drivers",
    "rank_process",
    "driver",
    "engine",
    "executor",
    "models",
    "layers",
    "weights",
    "comm",
    "kv.pool",
]


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize(("module", "path"), WORKER, ids=[module for module, _ in WORKER])
def test_worker_parts_point_downwards(module: str, path: Path) -> None:
    if part(module) not in WORKER_PARTS:
        return
    own = WORKER_PARTS.index(part(module))
    for imported in imports(path):
        if within(imported, "warmroute_worker") and part(imported) in WORKER_PARTS:
            assert WORKER_PARTS.index(part(imported)) >= own, f"{module} imports {imported} from above"


def may_bring_torch(module: str) -> bool:
    return any(within(module, f"warmroute_worker.{name}") for name in WITH_TORCH)


@pytest.mark.parametrize("module", [module for module, _ in WORKER if not may_bring_torch(module)])
def test_worker_without_torch(module: str) -> None:
    brought = {name for name in closure(module) if within(name, "torch")}
    assert not brought, f"{module} brings along {sorted(brought)}"

"""The processes of a run without any: on which Ray and nodes they would be started, in what environment, and what is made of
their ends."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
import ray

from engine.capacity.kv_cache import GIB
from engine.config.placement import Part, place
from engine.core.errors import (
    ConfigError,
    EngineLostError,
    EngineStartError,
    PreemptedError,
    ProcessLostError,
    SemionError,
    UnexpectedError,
    WatchdogError,
    WeightSyncError,
)
from engine.models.config_file import read_shape
from engine.run.handles import RayFuture, typed_error
from engine.run.host_memory import held_by_node
from engine.run.machine import devices, host_bytes, interface_of
from engine.run.nodes import LOOPBACK, PROCESS_ENVIRONMENT, RAY_ENVIRONMENT, Node, check_devices, check_hosts
from engine.run.processes import Cluster
from engine.run.watch import _patience_seconds
from tests.builders import config, spec

LLAMA_8B = read_shape(Path(__file__).parents[3] / "configs" / "models" / "llama-3.1-8b")
ALL: tuple[Part, ...] = ("trainer", "engines", "reward_engine")


@pytest.mark.parametrize(("named", "found"), [(None, ("0", "1")), ("6,7", ("6", "7")), ("", ("0", "1"))])
def test_gpus_have_the_names_that_cuda_was_told(monkeypatch, named, found):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert devices(2.0) == found
    assert devices(0) == ()


def test_a_node_with_fewer_gpus_than_are_placed_on_it_is_named():
    made = config(cluster={"nodes": 2}, trainer={"data_parallel": 8})
    nodes = [Node("a", "10.0.0.1", "eth0", tuple("01234567"), GIB), Node("b", "10.0.0.2", "eth0", (), GIB)]
    with pytest.raises(ConfigError, match=r"found 8, and 0 on 10\.0\.0\.2: start Ray on nodes with GPUs only"):
        check_devices(place(made, ALL), nodes, 8)
    nodes[1] = Node("b", "10.0.0.2", "eth0", ("0",), GIB)
    check_devices(place(made, ALL), nodes, 8)
    nodes[0] = Node("a", "10.0.0.1", "eth0", tuple("0123"), GIB)
    with pytest.raises(ConfigError, match=r"found 8, and 4 on 10\.0\.0\.1: set it to 4"):
        check_devices(place(made, ALL), nodes, 8)


def test_a_node_with_less_memory_than_is_kept_on_it_is_named():
    """An 8B whose AdamW is on the hosts, 16 bytes a parameter shared by four ranks, and the reference on each: two a node."""
    made = config(
        cluster={"nodes": 2, "gpus_per_node": 2},
        trainer={"data_parallel": 4, "distributed_optimizer": True, "reference_memory": "host"},
        inference={"placement": "colocated"},
        sync={"sync_interval": 10},
        optimizer={"offload_share": 1.0},
        model={"dtype": "bfloat16"},
        checkpoint={"every": 1000},
    )
    resolved = spec(made, LLAMA_8B)
    assert resolved.copies == ("reference",)
    held = held_by_node(resolved)
    shared = (16 + 14) * 8_030_261_248 // 2  # and what a checkpoint copies, of the optimizer and weights
    assert sum(held[1].values()) == pytest.approx(shared + 2 * 2 * 8_030_261_248, rel=1e-6)
    first, second = (sum(held[node].values()) for node in (0, 1))
    nodes = [Node("a", "10.0.0.1", "eth0", (), first), Node("b", "10.0.0.2", "eth0", (), second)]
    check_hosts(resolved, nodes)
    nodes[1] = Node("b", "10.0.0.2", "eth0", (), second - 1)
    needed = f"{second / GIB:.1f}"
    with pytest.raises(
        ConfigError, match=rf"cluster\.nodes .* GiB on 10\.0\.0\.2 for {needed} GiB needed .*lower optimizer\.off"
    ):
        check_hosts(resolved, nodes)


def test_nodes_of_a_container_have_what_their_control_groups_leave(tmp_path):
    """The least of a group, of those above it, and of the machine; both versions of the interface."""

    def there(cgroup: str, **limits: str) -> int:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        (root / "proc" / "self").mkdir(parents=True)
        (root / "proc" / "self" / "cgroup").write_text(cgroup)
        for name, text in limits.items():
            file = root / "sys" / "fs" / "cgroup" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return host_bytes(root)

    whole = psutil.virtual_memory().total
    assert there("0::/\n") == whole
    assert there("0::/job/step\n", **{"job/step/memory.max": "max\n", "job/memory.max": "4096\n"}) == 4096
    assert there("0::/job\n", **{"job/memory.max": f"{2 * whole}\n"}) == whole
    assert there("0::/not/there\n", **{"memory.max": "8192\n"}) == 8192
    old = "3:cpuset:/\n4:memory:/docker/x\n0::/\n"
    assert there(old, **{"memory/docker/x/memory.limit_in_bytes": "9223372036854771712\n"}) == whole
    assert there(old, **{"memory/memory.limit_in_bytes": "12288\n"}) == 12288
    assert host_bytes(tmp_path / "nowhere") == whole


def test_the_interface_is_the_one_that_carries_the_address():
    assert interface_of("127.0.0.1") == interface_of("127.0.0.2") == "lo"
    with pytest.raises(ConfigError, match=r"no interface with 198\.51\.100\.7"):
        interface_of("198.51.100.7")


def test_several_nodes_are_refused_without_a_token(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    cluster = Cluster(spec(config(cluster={"nodes": 2})))
    with pytest.raises(ConfigError, match="found RAY_AUTH_MODE = 'disabled' and RAY_AUTH_TOKEN unset"):
        cluster.__enter__()
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    with pytest.raises(ConfigError, match="found RAY_AUTH_MODE = 'token' and RAY_AUTH_TOKEN unset"):
        cluster.__enter__()


def test_while_nodes_are_waited_for_sigterm_is_the_commands(monkeypatch):
    """ray.init takes it, and would end a run that waits for its nodes with an exit code that nobody requeues."""
    for name, value in {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x"}.items():
        monkeypatch.setenv(name, value)
    asked: list[object] = []
    monkeypatch.setattr(ray, "init", lambda **options: signal.signal(signal.SIGTERM, signal.SIG_IGN))

    def nodes() -> list[object]:
        asked.append(signal.getsignal(signal.SIGTERM))
        return []

    def ours(*_: object) -> None:
        """Stands for the command's handler."""

    monkeypatch.setattr(ray, "nodes", nodes)
    before = signal.signal(signal.SIGTERM, ours)
    try:
        with pytest.raises(WatchdogError, match=r"2 nodes must join the Ray cluster; 0 answered within .* gone are: none"):
            Cluster(spec(config(cluster={"nodes": 2}, trainer={"timeout_seconds": 0.01}))).__enter__()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert set(asked) == {ours}


def test_what_a_process_raised_is_told_from_its_death_and_from_a_mistake_in_the_code():
    def failed(cause: Exception) -> ray.exceptions.RayTaskError:
        return ray.exceptions.RayTaskError("train", "traceback", cause)

    causes = KeyError("lr"), RuntimeError("Connection closed")
    mistake, echo = (typed_error(failed(cause), "trainer rank 1") for cause in causes)
    assert isinstance(mistake, UnexpectedError) and not mistake.may_pass
    assert type(echo) is WatchdogError and echo.may_pass
    assert typed_error(failed(WeightSyncError("typed")), "trainer rank 1").exit_code == 6
    died = typed_error(ray.exceptions.RayActorError(), "trainer rank 0")
    assert isinstance(died, ProcessLostError) and str(died).startswith("the process of trainer rank 0 ended: ")
    log = Path("logs/trainer_rank_0.log")
    errors = failed(KeyError("lr")), ray.exceptions.RayActorError()
    named = [str(typed_error(error, "trainer rank 0", log)) for error in errors]
    assert named[0].endswith(f"; {log} shows where") and named[1].endswith(f"; its log is {log}")


def test_an_engine_that_cannot_be_made_is_told_from_one_that_is_lost(monkeypatch):
    def found(error: Exception) -> Exception:
        def get(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(ray, "get", get)
        with pytest.raises(EngineLostError) as caught:
            RayFuture(None, "engine 0").result(1.0)
        return caught.value

    died, never_was = (found(ray.exceptions.RayActorError(actor_init_failed=made)) for made in (False, True))
    assert type(died) is EngineLostError and died.may_pass
    assert isinstance(never_was, EngineStartError) and not never_was.may_pass and never_was.exit_code == 5


def test_an_answer_that_is_lost_with_its_machine_is_a_lost_engine_and_a_typed_error_stays_one(monkeypatch):
    def found(error: Exception) -> Exception:
        def get(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(ray, "get", get)
        with pytest.raises(SemionError) as caught:
            RayFuture(None, "judges of node 1", Path("node.log")).result(1.0)
        return caught.value

    for kind in (ray.exceptions.ObjectLostError, ray.exceptions.OwnerDiedError):
        gone = found(kind("ab" * 14, None, "judging"))
        assert type(gone) is EngineLostError and gone.may_pass
        assert f"the answer of judges of node 1 cannot be had ({kind.__name__}: " in str(gone)
        assert str(gone).endswith("; its log is node.log")
    own = ConfigError("no such file there")
    assert found(ray.exceptions.RayTaskError("open", "traceback", own)) is own


def test_the_command_waits_longer_than_for_the_judges_of_other_nodes():
    """Two tries of an answer, each with three starts of a worker of 120 s and 51 s of silence; and 80 s for the node's word."""
    one, two = config(trainer={"data_parallel": 8}), config(cluster={"nodes": 2}, trainer={"data_parallel": 8})
    assert _patience_seconds(two) - _patience_seconds(one) == 2 * (3 * 120 + 51) + 80


def test_sigterm_while_ray_starts_leaves_a_run_to_be_continued(monkeypatch, tmp_path):
    """Ray makes a SystemExit of it; and what Ray has no type for is one of ours."""
    raised: list[BaseException] = [SystemExit(15), Exception("The current node timed out during startup.")]

    def init(**options: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise raised.pop(0)

    def ours(*_: object) -> None:
        """Stands for the command's handler."""

    monkeypatch.setattr(ray, "init", init)
    before = signal.signal(signal.SIGTERM, ours)
    try:
        with pytest.raises(PreemptedError, match="asked to stop while Ray started"):
            Cluster(spec(config())).__enter__()
        assert signal.getsignal(signal.SIGTERM) is ours
        with pytest.raises(WatchdogError, match=r"Ray did not start on this machine: The current node timed out .* logs"):
            Cluster(spec(config())).__enter__()
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_process_that_is_late_is_not_said_to_have_ended():
    late = typed_error(ray.exceptions.GetTimeoutError("Get timed out"), "trainer rank 0")
    assert str(late).startswith("trainer rank 0 did not start within trainer.timeout_seconds: raise it")


@pytest.fixture
def started(monkeypatch):
    """The environment that Ray has when it starts, each time; it starts nothing."""
    seen: list[dict[str, str]] = []

    def init(**options: object) -> None:
        seen.append(dict(os.environ))
        os.environ["PYTHONBREAKPOINT"] = "ray.util.rpdb._driver_set_trace"  # as Ray does

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "a", "Resources": {}}])
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return seen


def test_a_run_leaves_the_environment_as_it_was_and_has_a_token_of_its_own(monkeypatch, started):
    """Also where another run's token is still there, and where Ray does not start."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another's")
    monkeypatch.delenv("RAY_DEDUP_LOGS", raising=False)
    before = dict(os.environ)
    for _ in range(2):
        with Cluster(spec()):
            assert os.environ["RAY_AUTH_MODE"] == "token"
        assert dict(os.environ) == before
    monkeypatch.setattr(ray, "nodes", lambda: [])
    with pytest.raises(ValueError, match="not enough values"):
        Cluster(spec()).__enter__()
    assert dict(os.environ) == before
    wanted = RAY_ENVIRONMENT | PROCESS_ENVIRONMENT | LOOPBACK
    assert all(seen.items() >= wanted.items() for seen in started)
    tokens = {seen["RAY_AUTH_TOKEN"] for seen in started}
    assert len(tokens) == 3 and all(len(token) == 64 for token in tokens)


def test_logs_are_where_every_node_can_write_them(monkeypatch, tmp_path, started, capsys):
    """Those of a training with its records; of another command on several nodes with what it makes, else in run.directory."""
    alone = Cluster(spec(config(tmp_path / "run"), parts=("engines",)))
    with alone:
        assert alone.logs.is_dir() and not alone.logs.is_relative_to(tmp_path)
    assert not alone.logs.exists(), "nothing failed, so nobody looks for them"
    training = Cluster(spec(config(tmp_path / "run")))
    with training:
        assert training.logs == tmp_path / "run" / "logs"
    monkeypatch.setattr("engine.run.processes.variables_of", lambda config: {})
    monkeypatch.setattr("engine.run.processes.open_ray", lambda config, verbose: [])
    several = spec(config(tmp_path / "run", cluster={"nodes": 2}), parts=("engines",))
    for folder in (tmp_path / "made", None):
        cluster = Cluster(several, folder=folder)
        cluster.__enter__()
        cluster.__exit__(KeyError, KeyError(), None)
        assert cluster.logs.parent == (folder or tmp_path / "run")
        assert str(cluster.logs) in capsys.readouterr().err
        assert cluster.logs.is_dir(), "an error names a file in it"


def test_ctrl_c_while_ray_is_imported_is_the_error_that_is_told(monkeypatch, tmp_path):
    """Ray is then half there: its submodules are, it is not, and importing it again fails."""

    def interrupted(config: object, *, verbose: bool) -> list[Node]:
        monkeypatch.delitem(sys.modules, "ray", raising=False)
        monkeypatch.setitem(sys.modules, "ray.util", None)  # as of an import that fails
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.run.processes.open_ray", interrupted)
    before = dict(os.environ)
    with pytest.raises(KeyboardInterrupt):
        Cluster(spec(config(tmp_path / "run"))).__enter__()
    assert dict(os.environ) == before

"""Split parameters: two and four real processes against one with whole tensors."""

import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gradclip as gc
import sharded_programs as programs
from gradclip.torch import Clipper, Pieces, clip_grad_norm_, norms
from gradclip.torch.verify import Verifier

WORLDS = [4, 2]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return what every process found, by the number of processes."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    lost = programs.start_and_lose(4, programs.losing_one, folder)
    results = {w: programs.start(w, programs.everything, folder) for w in WORLDS}
    return results | {"folder": folder, "lost": lost}


each_world = pytest.mark.parametrize("world", WORLDS)


def same_bits(tensors):
    first = tensors[0]
    assert all(type(t) is torch.Tensor and t.dim() == 0 for t in tensors)
    for t in tensors[1:]:
        torch.testing.assert_close(t, first, rtol=0, atol=0, equal_nan=True)


@each_world
def test_norm_in_every_layout(found, world):
    ranks = [r["every_layout"] for r in found[world]]
    for case, result in ranks[0].items():
        same_bits([r[case]["norm"] for r in ranks])
        norm, true = float(result["norm"]), result["true"]
        assert norm == pytest.approx(true, rel=1e-6), case
        assert max(r[case]["error"] for r in ranks) < 1e-6, case
        assert float(result["again"]) == pytest.approx(0.5, rel=1e-6), case
    assert len(ranks[0]) == 10 * 5 * 2


@each_world
def test_one_message_for_each_dimension_of_a_mesh(found, world):
    wide = 1 if world == 2 else 2
    expected = {"rows": 1, "columns": 1, "copies": 1, "beside": 1, "partial": 1}
    expected |= {"hybrid": wide, "twice": wide, "crossed": wide, "cube": wide}
    for (name, *_), result in found[world][0]["every_layout"].items():
        if name in expected:
            assert result["messages"] == expected[name], name


@each_world
@pytest.mark.parametrize(
    "scope", ["all", "tensor", "unit", "element", "moment", "verify"]
)
def test_messages_do_not_depend_on_how_many_tensors(found, world, scope):
    counts = {
        n: c for (s, n), c in found[world][0]["messages_by_count"].items() if s == scope
    }
    assert set(counts) == set(programs.COUNTS[world])
    assert len(set(counts.values())) == 1, counts
    plain = found[world][0]["messages_by_count"]["all", 10]
    assert scope != "verify" or counts[10] == plain + 2


@each_world
def test_extremes(found, world):
    ranks = [r["extremes"] for r in found[world]]
    for case, (norm, true) in ranks[0].items():
        same_bits([r[case][0] for r in ranks])
        torch.testing.assert_close(norm, true, rtol=1e-6, atol=0, equal_nan=True)


@each_world
@pytest.mark.parametrize("kind", programs.SCOPED)
def test_every_scope(found, world, kind):
    ranks = [r["every_scope"] for r in found[world]]
    for case, result in ranks[0].items():
        if case[1] != kind:
            continue
        assert max(r[case]["error"] for r in ranks) < 1e-6, case
        assert {r[case]["flags"] for r in ranks} == {result["expected"]}, case
        if result["norm"] is not None:
            for r in ranks:
                assert torch.equal(r[case]["norm"], result["norm"])
            torch.testing.assert_close(
                result["norm"], result["true"], rtol=1e-6, atol=1e-7, check_dtype=False
            )


@each_world
def test_all_processes_decide_alike(found, world):
    ranks = [r["policies"] for r in found[world]]
    for case, result in ranks[0].items():
        assert {r[case] for r in ranks} == {result}, case
        kind, policy, _ = case
        if kind not in ("nan", "copy"):
            assert result[0], case
        elif policy == "raise":
            name = "[0]" if kind == "nan" else "[2]"
            assert f"the gradients of {name} (1 of " in result, case
            assert f"elements) on rank {world - 1}; nothing was changed" in result
        else:
            assert not result[0], case
            assert result[2] == (policy != "skip"), case


@each_world
def test_what_only_the_caller_knows(found, world):
    for rank in found[world]:
        for case, (ours, true) in rank["callers"].items():
            assert ours == pytest.approx(true, rel=1e-6, abs=1e-6), case


@each_world
def test_copies_that_differ_are_the_same_number_everywhere(found, world):
    ranks = [r["disagreeing"] for r in found[world]]
    for case in ranks[0]:
        for i, (norm, finite, kept, mean) in enumerate(r[case] for r in ranks):
            assert bool(finite) == bool(kept) == (case[1] != "nan"), case
            # Each stage has tensors of its own.
            like = ranks[0 if case[0] == "all" else i - i % (world // 2)][case]
            torch.testing.assert_close(norm, like[0], rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(mean, like[3], rtol=0, atol=0)


@each_world
def test_a_process_without_rows_takes_part_in_all_messages(found, world):
    for infos, total in (r["without_rows"] for r in found[world]):
        assert infos == found[world][0]["without_rows"][0]
        assert total == pytest.approx(2 * math.sqrt(world - 1))


MEANT = {
    "flattened": "FSDP has made one of many; use FullyShardedDataParallel(use_orig",
    "flattened groups": "FSDP has made one of many",
    "flattened all": "",
    "no gradient": "none of 2 parameters has a gradient, on no process",
    "submeshes": "lies on a mesh without this process",
    "meta": "are on the meta device",
    "a free group": "",
    "units beside others": "has groups over each 'unit' beside others",
    "a lone scaler": "GradScaler skips a step on the process that overflowed",
    "a shared scaler": "",
}


@each_world
def test_what_could_only_be_wrong_is_said(found, world):
    for rank in found[world]:
        for case, sentence in rank["sentences"].items():
            meant = MEANT[case]
            assert meant in sentence if meant else not sentence, case


def test_groups_in_an_order_that_cannot_work_are_refused_on_every_process(found):
    for rank in found[4]:
        right, wrong = rank["ordered"]["ep, pp"], rank["ordered"]["pp, ep"]
        # Two dense layers, of ones and of twos, and experts of threes and of fours.
        assert right == pytest.approx(math.sqrt(2 * (1 + 4 + 9 + 16)))
        assert wrong.startswith("VerifyError: ")
        assert "the order of several groups in split_over" in wrong


@each_world
def test_a_group_without_this_process_compares_nothing(found, world):
    first, *others = [r["elsewhere"] for r in found[world]]
    assert first == pytest.approx(math.sqrt(2))
    for other in others:
        assert other == (
            "ValueError: verify is a group that this process is not a member of; hand "
            "over verify=False here."
        )


@each_world
def test_a_memory_of_the_tensors_of_a_stage_goes_back_to_that_stage(found, world):
    for rank, cases in enumerate(r["stage_memories"] for r in found[world]):
        for kind, case in cases.items():
            assert case["own"], kind
            assert {f"names@{rank}of{world}", "step"} < set(case["names"]), kind
            assert bool(case["refusal"]) == (rank > 0), kind


@each_world
def test_rows_are_not_compared_as_if_they_were_tensors(found, world):
    assert all(r["verified_units"] for r in found[world])


SAID = {
    "replica: all": ["rank 1", "'dense.weight'", "replica is counted as a shard"],
    "replica: dense": ["rank 1", "'dense.weight'", "replica is counted as a shard"],
    "sync: ddp": ["rank 1", "'dense.weight'", "before the gradients are sync"],
    "sync: function": ["rank 1", "'[0]'", "before the gradients are sync"],
    "sync: beside": ["rank 1", "'norm'", "before the gradients are synchronised"],
    "group: experts": ["rank 1", "'expert.weight'", "a group is missing"],
    "group: stages": ["rank 1", "'early.weight'", "a group is missing"],
    "group: one side": ["rank 1", "'expert.weight'", "a group is missing on rank 1"],
    "limit": ["rank 1", "limit 1.5", "another limit"],
    "limits": ["rank 1", "limit 6", "another limit"],
    "memory": ["limit", "another saved memory"],
}


@each_world
@pytest.mark.parametrize("case", SAID)
def test_verify_says_on_every_process_what_is_wrong(found, world, case):
    for rank in found[world]:
        said, grads_kept, weights_kept = rank["verified"][case]
        assert said == found[world][0]["verified"][case][0], "all say the same"
        assert said.startswith("VerifyError: ")
        for part in SAID[case]:
            assert part in said
        assert weights_kept
        # What was decided is known only after it was done.
        assert grads_kept or case.startswith("limit")
        assert "'expert" not in said or case != "replica: dense"


def test_verify_has_nothing_to_do_on_one_process():
    w = torch.nn.Parameter(torch.ones(2))
    w.grad = torch.tensor([3.0, 4.0])
    assert float(Clipper([w], gc.Norm(1.0), verify=True).clip_().norm) == 5
    assert float(clip_grad_norm_([w], 2.0, verify=True)) == pytest.approx(1)


@each_world
def test_verify_tells_the_others_when_one_refuses(found, world):
    first, *others = [r["verified"]["refusal"][0] for r in found[world]]
    assert first.startswith("VerifyError: rank 1")
    for other in others:
        assert other.startswith("NonFiniteError: NaN or infinity in the gradients of d")


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("error", [ValueError, TypeError])
def test_a_refusal_is_not_sent_into_the_messages_of_a_clip(split, error):
    verifier, sent = object.__new__(Verifier), []
    verifier.split, verifier._gathered = split, sent.append

    def refuse():
        raise error("a schedule that fails on this process")

    with pytest.raises(error, match="schedule"):
        verifier.compare(refuse)
    # The others wait for norms where parameters are split, and would be killed.
    assert len(sent) == (0 if split else 1)


@each_world
def test_verify_is_silent_where_all_is_right(found, world):
    for rank in found[world]:
        right = {k: v[0] for k, v in rank["verified"].items() if "right" in k}
        assert len(right) == 4
        assert set(right.values()) == {None}


def trained(found, world, kind, layers):
    """Yield the worst of all processes for each optimizer and order of the norm."""
    ranks = [r["training"] for r in found[world]]
    for case in ranks[0]:
        if case[:2] == (layers, kind):
            every = [r[case] for r in ranks]
            yield case[2:], {key: max(r[key] for r in every) for key in every[0]}


@each_world
@pytest.mark.parametrize("kind", programs.KINDS)
def test_training(found, world, kind):
    cases = dict(trained(found, world, kind, "wide"))
    assert len(cases) == 1 + programs.orders(kind, world)
    for (name, *_), worst in cases.items():
        assert worst["norm"] < 1e-6
        assert worst["grads"] < 1e-6
        assert worst["clipped"] > 0
        # From here on the split model is compared with one that trained by itself. Adam
        # enlarges rounding, and in "precision" the network is computed in bfloat16.
        near = 0.1 if kind == "precision" else 1e-6 if name == "SGD" else 1e-5
        assert worst["drift"] < near
        assert worst["apart"] < near


@pytest.mark.parametrize("kind", sorted({*programs.KINDS} - {"precision"}))
def test_training_of_layers_that_round_by_themselves(found, kind):
    for layers, near in (("plain", 1e-5), ("float64", 1e-12)):
        cases = dict(trained(found, 2, kind, layers))
        assert len(cases) == (2 if layers == "plain" else 1)
        for worst in cases.values():
            for key in ("drift", "apart"):
                assert worst[key] < near, (layers, key)
            assert worst["clipped"] > 0


@each_world
@pytest.mark.parametrize("rule", programs.RULES)
def test_memories_are_equal_to_the_bit(found, world, rule):
    first, *others = [r["adaptive"][rule] for r in found[world]]
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[key], x) for key, x in first.items())
    assert all(type(x) is torch.Tensor for x in first.values())
    assert int(first["step"]) == 300
    assert int(first["skipped"]) > 0
    for x in first.values():
        assert not x.isnan().any()


@each_world
@pytest.mark.parametrize("rule", programs.INSIDE)
def test_what_is_remembered_of_elements_is_split_as_they_are(found, world, rule):
    for rank in found[world]:
        cases = {k: v for k, v in rank["elements"].items() if k[1] == rule}
        assert cases.pop(("gone on", rule)) == 0
        assert len(cases) == 10 * (rule in programs.INSIDE_ON[world])
        for case, result in cases.items():
            assert result["error"] < 1e-6, case
            assert result["memory"] < 1e-6, case
            assert result["reports"] < 1e-6, case
            assert result["clipped"] > 2, case


@each_world
def test_a_file_of_one_process_has_the_whole_memory_or_is_refused(found, world):
    for rank, result in enumerate(r["one_file"] for r in found[world]):
        told = "one process has written for all" if rank else ""
        assert told in result["refusal"]
        assert bool(result["refusal"]) == result["untouched"] == (rank > 0)
        assert "use a rule over norms that all have, or do this." in result["trainer"]
        assert result["plain"]
        assert result["same"]
        assert result["copies"] == ""


@each_world
def test_a_memory_of_plain_pieces_goes_back_to_its_own_process_only(found, world):
    for rank, result in enumerate(r["plain_pieces"] for r in found[world]):
        for kind, case in result.items():
            told = f"of process 0of{world} (from 0)" if rank else ""
            assert told in case["refusal"], kind
            assert bool(case["refusal"]) == (rank > 0), kind
            assert case["own"], kind
            assert "memories of plain pieces" in case["whole"], kind
            assert case["file"] == case["whole"], kind
            assert (
                "use a rule over norms that all have, or do this." in case["trainer"]
            ), kind
            assert not any("@" in name for name in case["norms"]), kind


@each_world
def test_a_model_that_rank_0_does_not_have_is_recorded_once(found, world):
    # The header and one step.
    assert [rank["some"] for rank in found[world]] == [2] * world


@each_world
@pytest.mark.parametrize("fused", [False, True])
def test_the_memory_of_a_split_optimizer_is_read(found, world, fused):
    for rank in found[world]:
        apart, clipped = rank["borrowing"][fused]
        assert apart < 1e-6
        assert clipped > 2


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("rule", programs.RULES)
def test_checkpoints_of_four_processes_load_on_two_and_on_one(found, rule):
    saved = found[4][0]["adaptive"][rule]
    alone = programs.loading(0, 1, found["folder"])[rule]
    for loaded in [alone, *(r["loading"][rule] for r in found[2])]:
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[key], x) for key, x in saved.items())


@each_world
def test_deterministic_norms_have_the_bits_of_one_process(found, world):
    for rank in found[world]:
        assert rank["deterministic"] == {0: 0, 1: 0}


@each_world
def test_the_tests_notice_copies_that_are_counted_twice(found, world):
    for rank in found[world]:
        assert rank["counted_twice"] == pytest.approx(4 * math.sqrt(world))


@each_world
def test_pieces_are_refused_without_the_wrapper_that_knows_their_group(found, world):
    for kind, (message, names) in found[world][0]["unwrapped"].items():
        assert "hand over the model that FullyShardedDataParallel returned" in message
        assert not any("_fsdp_wrapped_module" in name for name in names), kind
    assert names != found[world][0]["unwrapped"]["fsdp1"][1]


@each_world
def test_what_is_cut_after_the_clipper_was_made_is_followed_or_refused(found, world):
    for rank in found[world]:
        cases = rank["wrapped_later"]
        _, right = cases["right"]
        for case in [("layers", "clipper"), ("layers", "attached"), "rewired"]:
            said, info = cases[case]
            assert not said, case
            assert float(info.norm) == pytest.approx(float(right.norm), rel=1e-6), case
        for case in [("root", "clipper"), ("root", "attached")]:
            said, info = cases[case]
            assert "hand over the model that FullyShardedDataParallel returned" in said
            assert info is None
        assert "this clipper remembers 1 steps with whole ones" in cases["late"]
        assert "in_backward=True measures whole parameters" in cases["in backward"]
        assert "DTensors in the place of 4 parameters" in cases["replaced"]
        assert "as fully_shard does? Then make the clipper behind it" in cases["listed"]


def test_a_process_that_is_killed_ends_the_others_and_the_run_goes_on(found):
    survivors, codes = found["lost"]
    assert codes == [0, 0, 0, -signal.SIGKILL]
    assert len(survivors) == 3
    whole = survivors[0][0]
    for again, before, said, waited in survivors:
        assert again == whole
        assert before == whole[:8]
        assert "Error" in said
        assert waited < programs.GROUP_TIMEOUT
    for rank in found[4]:
        assert rank["going_on"] == whole[6:]
    assert any(norm > limit for norm, limit in whole[6:]), "nothing was clipped"


def start_example():
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    path = Path(__file__).parent.parent / "examples" / "fsdp2.py"
    return subprocess.run(
        [*run, "--standalone", str(path)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_the_example_runs_as_it_is_started_by_hand():
    done = start_example()
    if "terminate called without an active exception" in done.stderr:
        # On a busy machine gloo's threads may outlive the interpreter
        # (pytorch#179291).
        done = start_example()
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^step (\d): norm [\d.e+]+, scale", done.stdout, re.M) == [
        *"01234"
    ]


def test_rules_that_need_what_the_parts_do_not_have_are_refused():
    class Group:
        group_name, size = "g", staticmethod(lambda: 2)

    w = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="laid flat"):
        Clipper([w], gc.Relative(), split_over=lambda n, p: Pieces(Group(), None))
    groups = gc.by_name({"*": gc.Norm(1.0)})
    for rule in (groups, gc.Skip(groups), gc.chain(gc.Value(1.0), groups)):
        with pytest.raises(ValueError, match="other processes hold"):
            Clipper([w], rule, split_over=Group())
    with pytest.raises(TypeError, match=r"split_over for '\[0\]' is int; it takes a"):
        Clipper([w], gc.Norm(1.0), split_over=lambda n, p: 3)
    outside = torch.distributed.GroupMember.NON_GROUP_MEMBER
    with pytest.raises(ValueError, match="not a member of; return None for it here"):
        Clipper([w], gc.Norm(1.0), split_over=lambda n, p: Pieces(outside, 0))
    with pytest.raises(ValueError, match="not a member of; hand over None here"):
        Clipper([w], gc.Norm(1.0), split_over=outside)
    rule = gc.chain(gc.Norm(1.0, over="unit"), gc.Norm(1.0, over="unit", axis=-1))
    w.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match="several axes"):
        Clipper([w], rule, split_over=Group()).clip_()


@pytest.mark.parametrize("size", [1.0, 3.0, 1e-300, 1e300, math.inf, math.nan, 0.0])
def test_rounding_to_24_bits(size):
    x = torch.tensor(size, dtype=torch.float64) * (1 + 1e-9)
    once = norms.rounded(x)
    torch.testing.assert_close(once, x, rtol=2**-24, atol=0, equal_nan=True)
    torch.testing.assert_close(
        norms.rounded(once), once, rtol=0, atol=0, equal_nan=True
    )
    if 1e-30 < size < 1e30:
        assert once == x.float().double()

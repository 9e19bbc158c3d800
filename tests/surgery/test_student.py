"""A student gets the teacher's weights where names and shapes agree, and the layers that were chosen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moekit as mk
from moekit.errors import UserError
from moekit.surgery.student import choose_layers, initialize_student
from moekit.transformer import DecoderOnly, every_other

D, E, VOCAB = 8, 3, 20
IDS = torch.arange(10).view(2, 5) + 3


def network(layers: int, *, dense: bool = False, dim: int = D, seed: int = 0) -> DecoderOnly:
    torch.manual_seed(seed)

    def sparse(layer: int, side: str) -> nn.Module:
        return mk.MoELayer(mk.routers.switch(dim, E, jitter=0.0), mk.experts.GroupedMLP(E, dim, 12))

    return DecoderOnly(VOCAB, dim, 2, layers, 12, feed_forward=None if dense else every_other(sparse)).eval()


def hidden(model: DecoderOnly) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model.decode(IDS).hidden)


def test_a_dense_student_gets_all_but_experts() -> None:
    teacher, student = network(4), network(4, dense=True, seed=1)
    before = student.state_dict()
    found = initialize_student(student, teacher, teacher.state_dict(), experts=False)
    own = {name for name in before if name not in found.inherited}
    assert own == {f"decoder.layers.{n}.feed_forward.{w}.weight" for n in (1, 3) for w in ("w_in", "w_out")}
    for name, value in found.weights.items():
        assert torch.equal(value, before[name] if name in own else teacher.state_dict()[name])


def test_a_student_like_the_teacher_is_the_teacher() -> None:
    teacher, student = network(4), network(4, seed=1)
    found = initialize_student(student, network(4, seed=2).to("meta"), teacher.state_dict())
    assert set(found.inherited) == set(student.state_dict())
    student.load_state_dict(found.weights)
    assert torch.equal(hidden(student), hidden(teacher))


def test_without_experts_a_sparse_student_keeps_its_own() -> None:
    teacher, student = network(4), network(4, seed=1)
    found = initialize_student(student, teacher, teacher.state_dict(), experts=False)
    kept = set(student.state_dict()) - set(found.inherited)
    assert kept == {
        f"decoder.layers.{n}.feed_forward.{w}"
        for n in (1, 3)
        for w in ("router.weight", "experts.w_in", "experts.w_out")
    }


def test_a_shallow_student_gets_whole_layers() -> None:
    """Named ones, or by default spread ones: sparse layers from sparse ones, and everything fits."""
    teacher, student = network(6), network(4, seed=1)
    found = initialize_student(student, teacher, teacher.state_dict())
    assert found.layers == {"decoder.layers": (0, 1, 4, 5)}
    assert set(found.inherited) == set(student.state_dict())
    student.load_state_dict(found.weights)
    cut = network(6)
    for number in (3, 2):
        del cut.decoder.layers[number]
    assert torch.equal(hidden(student), hidden(cut))
    chosen = initialize_student(student, teacher, teacher.state_dict(), layers={"decoder.layers": (2, 3, 4, 5)})
    name = "decoder.layers.{}.self_attention.out.weight"
    for n, origin in enumerate((2, 3, 4, 5)):
        assert torch.equal(chosen.weights[name.format(n)], teacher.state_dict()[name.format(origin)])


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ("ds", "dsdsds", (0, 5)),
        ("dsds", "dsdsds", (0, 1, 4, 5)),
        ("ddd", "dsds", (0, 2, 3)),
        ("dsds", "dsds", (0, 1, 2, 3)),
        ("s", "ds", (1,)),
        ("d", "ddd", (2,)),
        ("ddddd", "ddd", (0, 0, 1, 1, 2)),
        ("dds", "dddddds", (0, 3, 6)),
        ("", "ds", ()),
    ],
)
def test_choice_of_layers(student: str, teacher: str, expected: tuple[int, ...]) -> None:
    found = choose_layers([kind == "s" for kind in student], [kind == "s" for kind in teacher])
    assert found == expected
    if len(student) <= len(teacher):
        assert list(found) == sorted(set(found))


def test_bad_requests_are_refused() -> None:
    teacher, student = network(4), network(2, seed=1)
    weights = teacher.state_dict()
    with pytest.raises(UserError, match="2 numbers below 4, the teacher's layers: got 0, 4"):
        initialize_student(student, teacher, weights, layers={"decoder.layers": (0, 4)})
    with pytest.raises(UserError, match=r"2 numbers below 4, .*: got 0, 1, 2"):
        initialize_student(student, teacher, weights, layers={"decoder.layers": (0, 1, 2)})
    with pytest.raises(UserError, match=r"stacks of the student: got encoder\.layers. There are: decoder\.layers"):
        initialize_student(student, teacher, weights, layers={"encoder.layers": (0, 1)})
    with pytest.raises(
        UserError, match=r"teacher's sizes: embedding\.weight is \(20, 12\), and \(20, 8\) in the teacher"
    ):
        initialize_student(network(2, dim=12), teacher, weights)
    with pytest.raises(UserError, match="nothing can be inherited"):
        initialize_student(nn.Linear(2, 2), teacher, weights)

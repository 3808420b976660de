from __future__ import annotations

import pytest
import torch
from torch import nn

from mmssl.nn.teacher import Teacher


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(1, 1, bias=False)
        self.head = nn.Linear(1, 1, bias=False)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        nn.init.constant_(self.body.weight, 8.0)
        nn.init.constant_(self.head.weight, 8.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.drop(x)))


def set_to(student: Student, value: float, count: int) -> None:
    with torch.no_grad():
        student.body.weight.fill_(value)
        student.head.weight.fill_(value)
        student.count.fill_(count)


def test_three_updates_worked_by_hand() -> None:
    student = Student()
    teacher = Teacher(student, copy=["head"])
    seen = []
    for value, decay in [(0.0, 0.5), (4.0, 0.75), (0.0, 0.0)]:
        set_to(student, value, count=len(seen) + 1)
        teacher.update(student, decay)
        seen.append((teacher.module.body.weight.item(), teacher.module.head.weight.item(), int(teacher.module.count)))
    # .5 * 8 + .5 * 0 = 4;  .75 * 4 + .25 * 4 = 4;  0 * 4 + 1 * 0 = 0; the head and the count are the student's
    assert seen == [(4.0, 0.0, 1), (4.0, 4.0, 2), (0.0, 0.0, 3)]


def test_it_lists_what_is_averaged_and_what_is_copied() -> None:
    teacher = Teacher(Student(), copy=["head"])
    assert teacher.averaged == ["body.weight"]
    assert teacher.copied == ["head.weight", "count"]


def test_a_decay_of_one_leaves_it_where_it_is() -> None:
    student = Student()
    teacher = Teacher(student)
    set_to(student, 1.0, 0)
    teacher.update(student, 1.0)
    assert teacher.module.body.weight.item() == 8.0


def test_weights_are_float32_and_move_by_less_than_bfloat16_can_tell() -> None:
    student = Student().bfloat16()
    teacher = Teacher(student)
    set_to(student, 4.0, 0)
    teacher.update(student, 0.9999)
    weight = teacher.module.body.weight
    assert weight.dtype == torch.float32
    assert weight.item() == pytest.approx(0.9999 * 8 + 0.0001 * 4, rel=1e-6)


def test_it_gives_no_gradient_and_takes_none() -> None:
    student = Student()
    teacher = Teacher(student)
    out = teacher(torch.ones(1, 1, requires_grad=True))
    assert not out.requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())


def test_it_never_trains() -> None:
    student = Student()
    student.train()
    both = nn.ModuleDict({"student": student, "teacher": Teacher(student)})
    both.train()
    assert student.drop.training
    assert not any(part.training for part in both["teacher"].modules())
    assert {both["teacher"](torch.ones(1, 1)).item() for _ in range(8)} == {64.0}


def test_it_is_saved_and_loaded_with_the_objective() -> None:
    student = Student()
    teacher = Teacher(student)
    set_to(student, 0.0, 5)
    teacher.update(student, 0.5)
    other = Teacher(Student())
    other.load_state_dict(teacher.state_dict())
    assert other.module.body.weight.item() == 4.0
    assert int(other.module.count) == 5
    assert set(teacher.state_dict()) == {"module.body.weight", "module.head.weight", "module.count"}


def test_its_weights_are_its_own() -> None:
    student = Student()
    teacher = Teacher(student)
    set_to(student, 0.0, 0)
    assert teacher.module.body.weight.item() == 8.0


def test_a_name_that_is_no_part_of_the_student_is_refused() -> None:
    with pytest.raises(ValueError, match="copy='heads' names no parameter of Student"):
        Teacher(Student(), copy=["heads"])


def test_a_decay_above_one_is_refused() -> None:
    student = Student()
    with pytest.raises(ValueError, match="ema_decay=1.5"):
        Teacher(student).update(student, 1.5)

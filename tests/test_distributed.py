"""distributed.py: gathering over ranks, seeds, and settings that are checked against their types."""

import json
import math
from dataclasses import dataclass
from typing import Literal

import pydantic
import pytest
import torch
from pydantic import PositiveInt
from ranks import on_two_ranks

import distributed
from distributed import all_gather_json, gathered_in_order, seeded_generator, sum_over_ranks
from flags import checked, one_line


def test_all_gather_json_alone_is_a_copy():
    value = {"a": [1, None, "ü"]}
    (found,) = all_gather_json(value)
    assert found == value and found is not value


def gathered():
    rank = distributed.rank()
    played = [f"task {task} sample {k}" for task in range(3)[rank::2] for k in range(2)]
    sums = [sum_over_ranks(rank + 1.5), sum_over_ranks({"a": rank, "b": 2})]
    return [all_gather_json({"ü" * (1 + 9 * rank): rank}), gathered_in_order(played, 3, 2), sums]


def test_two_ranks_gather_the_same_in_the_order_of_ranks_and_of_tasks(tmp_path):
    first, second = on_two_ranks(gathered, tmp_path)
    assert first == second
    texts, played, sums = first
    assert texts == [{"ü": 0}, {"ü" * 10: 1}]
    assert played == [f"task {task} sample {k}" for task in range(3) for k in range(2)]
    assert sums == [4.0, {"a": 1, "b": 4}]


def test_one_rank_gathers_its_own():
    assert gathered_in_order(["a", "b", "c", "d"], 2, 2) == ["a", "b", "c", "d"]
    assert [sum_over_ranks(2.5), sum_over_ranks({"a": 1})] == [2.5, {"a": 1}]


def test_seeded_generators_differ_by_every_seed():
    seeds = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 1)]
    assert len({seeded_generator("cpu", *s).initial_seed() for s in seeds}) == len(seeds)
    assert seeded_generator("cpu", 3, 4).initial_seed() == seeded_generator("cpu", 3, 4).initial_seed()


def test_seeded_leaves_the_global_random_state_as_it_was():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    inside = []
    for _ in range(2):
        with distributed.seeded("cpu", 1, 2):
            inside.append(torch.rand(3))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(*inside) and not torch.equal(inside[0], expected)


def test_write_json_replaces_the_file_whole(tmp_path):
    path = tmp_path / "a.json"
    distributed.write_json(path, [1])
    with pytest.raises(TypeError):
        distributed.write_json(path, [object()])
    assert json.loads(path.read_text()) == [1]
    distributed.write_json(path, [2])
    assert json.loads(path.read_text()) == [2] and list(tmp_path.iterdir()) == [path]


@dataclass(kw_only=True)
class Flags:
    number: PositiveInt = 3
    share: float = 0.5
    kind: Literal["one", "two"] = "one"


def test_checked_flags_are_an_instance_of_their_class():
    found = checked(Flags, {"share": 2})
    assert isinstance(found, Flags) and (found.number, found.share, found.kind) == (3, 2.0, "one")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"number": 0}, "number must be greater than 0, got 0"),
        ({"number": 1.5}, "number must be a valid integer, got a number with a fractional part, got 1.5"),
        ({"share": math.nan}, "share must be a finite number, got nan"),
        ({"share": math.inf, "number": 3}, "share must be a finite number, got inf"),
        ({"kind": "three"}, "kind must be 'one' or 'two', got 'three'"),
        ({"other": 7}, "there is no setting 'other'"),
    ],
)
def test_a_value_that_the_type_rules_out_is_named_in_one_line(values, message):
    with pytest.raises(ValueError) as error:
        checked(Flags, values)
    assert str(error.value) == message and type(error.value) is ValueError


def test_one_line_shows_the_message_of_a_validator_and_of_other_errors():
    def refuse(cls, value):
        raise ValueError(f"choose an even number, got {value}")

    refused = pydantic.create_model("M", a=(int, 0), __validators__={"v": pydantic.field_validator("a")(refuse)})
    with pytest.raises(pydantic.ValidationError) as error:
        refused(a=3)
    assert one_line(error.value) == "choose an even number, got 3"
    assert one_line(OSError("the disk is full")) == "the disk is full"
    assert one_line(OSError("http://me:word@host\n\x1b[2J failed")) == r"http://***@host\n\x1b[2J failed"


def test_a_printed_line_cannot_steer_the_terminal(capsys):
    distributed.say("one\rtwo \x1b[2J\nBearer abc")
    assert capsys.readouterr().out == "one\\rtwo \\x1b[2J\nBearer ***\n"

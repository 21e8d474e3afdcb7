"""The parser that all commands share."""

import pytest

from diffusers_sparse3d.command_parser import CommandParser


@pytest.fixture
def parser():
    parser = CommandParser(prog="program")
    parser.add_argument("--num_views", type=int)
    parser.add_argument("--max-opening", type=float)
    parser.add_argument("--values", nargs="*")
    command = parser.add_subparsers(dest="command").add_parser("make")
    command.add_argument("--level_of-detail")
    command.add_argument("--num-steps", type=int)
    return parser


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--num-views", "3", "--max_opening=0.5"], {"num_views": 3, "max_opening": 0.5}),
        (["--num_views=3", "--max-opening", "0.5"], {"num_views": 3, "max_opening": 0.5}),
        (["--values", "num-views=1", "a_b"], {"values": ["num-views=1", "a_b"]}),
        (["make", "--num_steps", "4", "--level_of-detail", "x-y_z"], {"num_steps": 4, "level_of_detail": "x-y_z"}),
    ],
)
def test_hyphens_and_underscores_are_one(parser, words, expected):
    found = vars(parser.parse_args(words))
    assert {name: found[name] for name in expected} == expected


def test_what_is_unknown_is_told_as_it_was_written(parser, capsys):
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--num-view_s=3", "make"])
    assert stopped.value.code == 1 and "--num-view_s" in capsys.readouterr().err

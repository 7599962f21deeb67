"""Trace files of every shape, and files that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onebase.bench.load.traces import MOST_LINE, TraceError, TraceRequest, read_trace

OWN = "time,adapter,tokens_in,tokens_out\n"


def written(tmp_path: Path, text: str, name: str = "trace.csv") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_our_own_shape_is_read_and_sorted(tmp_path: Path) -> None:
    path = written(tmp_path, OWN + "7.5,b,3,4\n5,a,1,2\n6,,8,9\n")
    assert read_trace(path) == [
        TraceRequest(0.0, "a", 1, 2),
        TraceRequest(1.0, None, 8, 9),
        TraceRequest(2.5, "b", 3, 4),
    ]


def test_our_own_shape_as_lines_of_json(tmp_path: Path) -> None:
    rows = [
        {"time": 1, "tokens_in": 2, "tokens_out": 3},
        {"time": 1.5, "adapter": "a", "tokens_in": 4, "tokens_out": 5},
    ]
    path = written(tmp_path, "\n\n".join(map(json.dumps, rows)), "trace.jsonl")
    assert read_trace(path) == [TraceRequest(0.0, None, 2, 3), TraceRequest(0.5, "a", 4, 5)]


@pytest.mark.parametrize(
    "rows",
    [
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n",
        "2024-05-10 00:00:00.680590+00:00,374,44\n2024-05-10 02:00:04.995169+02:00,396,109\n",
    ],
)
def test_azures_shape(tmp_path: Path, rows: str) -> None:
    first, second = read_trace(written(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows))
    assert (first.tokens_in, first.tokens_out, second.tokens_in, second.tokens_out) == (374, 44, 396, 109)
    assert second.at == pytest.approx(4.314579, abs=1e-6)


def test_burstgpts_shape_without_its_failures(tmp_path: Path) -> None:
    head = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    rows = "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,0,1087,API log\n118,GPT-4,417,276,693,API log\n"
    assert read_trace(written(tmp_path, head + rows)) == [
        TraceRequest(0.0, None, 472, 18),
        TraceRequest(113.0, None, 417, 276),
    ]


def test_mooncakes_shape(tmp_path: Path) -> None:
    row = {"timestamp": 3000, "input_length": 1000, "output_length": 52, "hash_ids": [46, 47]}
    path = written(tmp_path, json.dumps(row) + "\n" + json.dumps(row | {"timestamp": 4500}), "trace.jsonl")
    assert read_trace(path) == [TraceRequest(at, None, 1000, 52, (46, 47)) for at in (0.0, 1.5)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no request"),
        (OWN, "no request"),
        ("a,b\n1,2\n", "line 2: columns 'a, b'; needed are"),
        (OWN + "1,a,2\n", "line 2: fewer values"),
        (OWN + "1,a,2,3,4\n", "line 2: more values"),
        (OWN + "1,a,2,3\nnan,a,2,3\n", "line 3: time: 'nan'; allowed is a finite number"),
        (OWN + "-1,a,2,3\n", "time: '-1'; allowed is a time from 0"),
        (OWN + "1,a,2.5,3\n", "tokens_in: '2.5'; allowed is a whole number from 1"),
        (OWN + "1,a,0,3\n", "tokens_in"),
        (OWN + "1,a,3,1e300\n", "tokens_out"),
        (OWN + "1,a,3,many\n", "tokens_out: 'many'; allowed is a number"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "TIMESTAMP: 'yesterday'"),
        (OWN + "x" * (MOST_LINE + 1), "line 2: more than"),
        (OWN + '1,"a\x00b,2,3\n', "trace.csv, "),
    ],
)
def test_hostile_tables_are_refused_by_line_and_field(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(TraceError) as refused:
        read_trace(written(tmp_path, text))
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "line 1: no JSON"),
        ("[1]", "line 1: no JSON object"),
        ("[" * 100_000, "line 1: no JSON"),
        ('{"time": true, "tokens_in": 1, "tokens_out": 1}', "time: 'True'; allowed is a number"),
        ('{"time": 1, "tokens_in": [1], "tokens_out": 1}', "tokens_in: '[1]'"),
        ('{"time": 1, "tokens_in": 1, "tokens_out": 1, "adapter": 7}', "adapter: 7; allowed is a name"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": ["x"]}', "hash_ids"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": 3}', "hash_ids"),
        ('{"time": 1' + "0" * 5000 + ', "tokens_in": 1, "tokens_out": 1}', "line 1"),
    ],
)
def test_hostile_lines_of_json_are_refused(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(TraceError) as refused:
        read_trace(written(tmp_path, text, "trace.jsonl"))
    assert told in str(refused.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match="not UTF-8"):
        read_trace(path)


def test_only_the_first_requests_are_read_where_so_many_are_asked_for(tmp_path: Path) -> None:
    assert len(read_trace(written(tmp_path, OWN + "1,a,2,3\n" * 10), most=4)) == 4

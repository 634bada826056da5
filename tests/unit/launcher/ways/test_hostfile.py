"""Hostfiles and the filters over them."""

import pytest

from launcher.ways.hostfile import Host, choose_hosts, read_hostfile
from sparse_zero.errors import UserError

HOSTS = [Host("n1", 2), Host("n2", 4), Host("n3", 1)]


def test_hosts_come_in_the_files_order_without_comments(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("# two hosts\nn2 slots=4\n\n  n1\tslots=2  # the first\n")
    assert read_hostfile(file) == [Host("n2", 4), Host("n1", 2)]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "lists no host"),
        ("# n1 slots=2\n", "lists no host"),
        ("n1 slots=2\nn2\n", "line 2: 'n2' is not of the form 'HOST slots=N'"),
        ("n1 slot=2\n", "line 1: 'n1 slot=2'"),
        ("n1 slots=0\n", "at least 1"),
        ("n1 slots=two\n", "line 1"),
        ("n1 slots=1\nn1 slots=2\n", "line 2: host n1 is listed twice"),
        # ssh would read a file of options, or run a program; pdsh would run the command here, or read a list.
        ("-F/tmp/options slots=1\n", "line 1: '-F/tmp/options' cannot be a host"),
        ("-oProxyCommand=id slots=1\n", "line 1"),
        ("-oPermitLocalCommand slots=1\n", "line 1: '-oPermitLocalCommand' cannot be a host"),
        ("exec:n1 slots=1\n", "'exec:n1' cannot be a host"),
        ("^list slots=1\n", "cannot be a host"),
        ("n1,n2 slots=1\n", "cannot be a host"),
        ("n[1-3] slots=1\n", "cannot be a host"),
        ("n1;id slots=1\n", "cannot be a host"),
        ("n1$(id) slots=1\n", "'n1$(id)' cannot be a host: use letters, digits, '.', '-' and '_'"),
        ("user@n1 slots=1\n", "cannot be a host"),
        ("n1\x1b[2J slots=1\n", "'n1\\x1b[2J' cannot be a host"),
        ("\x1b[2J\n", "line 1: '\\x1b[2J' is not of the form"),
    ],
)
def test_a_bad_hostfile_is_refused_by_its_line(tmp_path, text, complaint):
    file = tmp_path / "hosts"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        read_hostfile(file)
    assert str(file) in str(error.value)
    assert complaint in str(error.value)


def test_a_missing_hostfile_is_refused_by_its_name(tmp_path):
    with pytest.raises(UserError, match=r"launch\.hostfile: .*nowhere: No such file"):
        read_hostfile(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, HOSTS),
        ("n3@n1", None, [Host("n1", 2), Host("n3", 1)]),
        ("n2:3,1", None, [Host("n2", 2, (1, 3))]),
        (None, "n2", [Host("n1", 2), Host("n3", 1)]),
        (None, "n2:0@n3:0", [Host("n1", 2), Host("n2", 3, (1, 2, 3))]),
    ],
)
def test_filters_choose_hosts_and_devices(include, exclude, expected):
    assert choose_hosts(HOSTS, include, exclude) == expected


@pytest.mark.parametrize(
    ("include", "exclude", "complaint"),
    [
        ("n4", None, "launch.include: the hostfile has no host 'n4'; did you mean"),
        ("n1:2", None, "n1 has 2 slots, numbered from 0"),
        (None, "n1:a", "not of the form HOST or HOST:0,2"),
        (None, "n1@n2@n3", "leaves no host of n1, n2, n3"),
    ],
)
def test_filters_that_fit_no_host_are_refused(include, exclude, complaint):
    with pytest.raises(UserError) as error:
        choose_hosts(HOSTS, include, exclude)
    assert complaint in str(error.value)


def test_a_byte_order_mark_is_no_part_of_a_host(tmp_path):
    (tmp_path / "hosts").write_text("n1 slots=2\nn2 slots=1\n", encoding="utf-8-sig")
    assert [host.name for host in read_hostfile(tmp_path / "hosts")] == ["n1", "n2"]

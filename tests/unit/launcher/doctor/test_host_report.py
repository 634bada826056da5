"""What a host reports about itself."""

from pathlib import Path

import sparse_zero
from launcher.doctor import host_report


def test_the_code_checksum_depends_on_every_file_of_the_packages(tmp_path: Path) -> None:
    for package in host_report.CODE:
        (tmp_path / package / "inner").mkdir(parents=True)
        (tmp_path / package / "inner" / "module.py").write_text("1")
    before = host_report.code_checksum(tmp_path)
    (tmp_path / "rpn" / "inner" / "module.py").write_text("2")
    assert host_report.code_checksum(tmp_path) != before


def test_a_report_has_the_checksum_of_the_code_that_is_imported(tmp_path: Path) -> None:
    imported = Path(sparse_zero.__file__).parents[1]
    reported = host_report.build_report({})["code"]
    assert reported == host_report.code_checksum(imported)
    assert reported != host_report.code_checksum(tmp_path), "no code was found"

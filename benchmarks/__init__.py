"""Measurements behind the README's figures. Each script prints ratios against a limit measured in the same run."""

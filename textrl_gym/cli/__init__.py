"""The command line: `textrl-gym COMMAND ...`.

- `main`: the commands and their errors
- `options`: flags and TOML files as dataclasses
- `train`: train
- `compare`: compare, report and watch
- `judge`: evaluate and judge
"""

"""`python -m lowrank_cli` is the `lowrank` command."""

from lowrank_cli.main import run

if __name__ == "__main__":
    run()

"""What torchrun tells the processes of a run."""

import socket


def places(ranks: int) -> list[dict[str, str]]:
    """Return what torchrun tells each rank; nothing for a process alone."""
    if ranks == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{"RANK": str(i), "LOCAL_RANK": str(i), **common} for i in range(ranks)]

"""`python -m pipelines`: serve the deployments, so that `prefect deployment run train/vrt` works while this runs."""

import os

from vrt import services


def main() -> None:
    os.environ.update(services.load_environment())
    # Prefect reads its address when it is imported.
    from pipelines.train import train

    # One training at a time: a second run waits for the first.
    train.serve(name="vrt", limit=1, print_starting_message=True)


if __name__ == "__main__":
    main()

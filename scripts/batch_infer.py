"""A file of questions: `visualglm batch` under the name that it had."""

from older_names import run_command


if __name__ == "__main__":
    run_command("batch")

"""The command line: one thin file a verb, and the only place with YAML and arguments.

`main.py` holds the table `VERBS`, so `meristem --help` imports no verb; a verb's module is imported when it
is called. It defines one of two things:

* Of a verb with arguments of its own:

      def add_arguments(parser: argparse.ArgumentParser) -> None
      def run(args: argparse.Namespace) -> int

  `parser` already has the verb's name, its help line and its example; `run` returns the exit code (0).
* Of a verb whose arguments are the keys of a config (`fit`, `validate`, `test`), or depend on those given (`score`):

      def run_argv(argv: list[str], parser: argparse.ArgumentParser) -> int

  with `argv` what stands behind the verb. `parser` has no arguments yet; the module answers `--help`.

What a verb may rely on, and must do:

* Import nothing heavy (torch, numpy, pyarrow, lightning, jsonargparse) at the top of the module, only inside
  `run` or `run_argv`: `meristem VERB --help` answers at once too.
* Raise `meristem.errors.UserError` (`ConfigError`, `DataError`, `CheckpointError`) for what the user can
  mend: `main` prints one line, `meristem: error: ...`, and ends with 2. Any other exception ends with 1, one
  line and a kept traceback. Print no error and call no `sys.exit` yourself.
* Ctrl-C arrives as `KeyboardInterrupt` (130) and SIGTERM as `SystemExit(143)`, both raised where the main
  thread is: clean up in `finally` and let them pass. A verb that installs a handler of its own gives the
  old one back.
* `--debug` and `--version` are taken by `main` and never reach a verb.
* Results go to stdout; progress and remarks go to stderr (`meristem.progress.Progress`).
"""

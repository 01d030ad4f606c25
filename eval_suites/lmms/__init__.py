"""foveate in lmms-eval: models that take a method among their arguments, our suites as tasks, and benches on public ones."""

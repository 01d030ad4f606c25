"""foveate in lmms-eval: models that take a method as an argument, our suites as tasks, and benches on public ones."""

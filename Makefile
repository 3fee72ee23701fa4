.PHONY: style quality test test-slow notebooks bench

sources := mamba_rsst tests benchmarks recipes

style:     ## format and fix what can be fixed
	ruff check --fix $(sources)
	ruff format $(sources)

quality:   ## fail on anything that `make style` would change or cannot fix
	ruff check $(sources)
	ruff format --check $(sources)

test:      ## everything that CI runs
	python -m pytest -n 2

test-slow: ## the long end-to-end runs
	python -m pytest -m slow

notebooks: ## run every notebook (needs the extra `notebooks`)
	python -m pytest --nbmake --nbmake-timeout=900 notebooks

bench:     ## the CPU benchmarks
	python benchmarks/bench_scan.py
	python benchmarks/bench_train.py
	python benchmarks/bench_pruned.py
	python benchmarks/bench_infer.py
	python benchmarks/bench_widths.py
	python benchmarks/bench_decode.py
	python benchmarks/bench_lm.py

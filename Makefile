# What is not run by `pytest`.

.PHONY: conformance release

# transformers' own common tests with this package: make conformance TRANSFORMERS=/path/to/its/repository
conformance:
	@test -f "$(TRANSFORMERS)/tests/test_modeling_common.py" || { \
		echo "Give the path of a checkout of transformers of the installed release:"; \
		echo "    make conformance TRANSFORMERS=/path/to/transformers"; exit 2; }
	HF_HUB_OFFLINE=1 PYTHONPATH="$(TRANSFORMERS)" python -m pytest -c tests/conformance/pytest.ini tests/conformance -rs

# The commit that is checked out as wheel and source distribution, with a bill of materials and SHA-256s, in dist/:
# make release. What is left to do, signing most of all, stands in CONTRIBUTING.md.
release:
	python -m tools.release dist

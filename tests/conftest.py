"""One thread a process, twins side by side, and a browser where there is one."""

import os
import shutil

import pytest
import torch

# The tests run in several processes, and small sums gain nothing from threads.
torch.set_num_threads(1)
# Unless it is told to check or not to, torch warns at the first sparse tensor.
torch.sparse.check_sparse_tensor_invariants.enable()

# Several threads that compile for JAX take longer where both cores are busy.
FLAG = "--xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}"

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def pytest_collection_modifyitems(items):
    """Keep the twins of a rule in one process, which goes through its run once."""
    for item in items:
        if item.path.name == "test_twins.py" and hasattr(item, "callspec"):
            item.add_marker(pytest.mark.xdist_group(item.callspec.params["name"]))


@pytest.fixture
def browser():
    if CHROMIUM is None:
        message = "no chromium here: the pages were not looked at in a browser"
        if os.environ.get("GRADCLIP_BROWSER") == "required":
            pytest.fail(message)
        pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield browser
        browser.close()

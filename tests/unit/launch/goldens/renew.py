"""``make goldens``: write the manifests anew that the tests compare with."""

from tests.unit.launch.manifest_cases import CASES, GOLDENS, text

if __name__ == "__main__":
    for name in CASES:
        (GOLDENS / f"{name}.yaml").write_text(text(name), encoding="utf-8")

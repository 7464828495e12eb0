"""The package's own imports, walked as a graph."""

from __future__ import annotations

import grimp
import networkx


def test_the_package_has_no_import_cycle() -> None:
    """Prove that no module of the package imports itself over others; lazy imports count too.

    It does not look at imports of other packages.
    """
    imports = grimp.build_graph("spark_nemo")
    graph = networkx.DiGraph(
        (module, imported)
        for module in imports.modules
        for imported in imports.find_modules_directly_imported_by(module)
    )

    cycles = [
        sorted(group) for group in networkx.strongly_connected_components(graph) if len(group) > 1
    ]

    assert graph.number_of_edges() > 500
    assert cycles == []

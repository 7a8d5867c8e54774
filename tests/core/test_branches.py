"""Token trees: parents, children, depths and paths of their nodes."""

from calm.core.branches import TEXT, Branches

#   text - 5 - 6 - 8
#     |      \ 7
#     9
BRANCHES = Branches([5, 6, 9, 7, 8], [TEXT, 0, TEXT, 0, 1])


def test_structure_of_a_tree():
    assert BRANCHES.children == {TEXT: [0, 2], 0: [1, 3], 1: [4]}
    assert list(BRANCHES.depths) == [0, 1, 0, 1, 2] and BRANCHES.longest == 3
    assert [BRANCHES.tokens_to(node) for node in range(TEXT, 5)] == [
        [],
        [5],
        [5, 6],
        [9],
        [5, 7],
        [5, 6, 8],
    ]
    assert BRANCHES.sees().int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1],
    ]


def test_draft_without_branches_is_a_line():
    line = Branches.line([5, 6, 7])
    assert line.is_line and not BRANCHES.is_line and Branches().is_line
    assert line.children == {TEXT: [0], 0: [1], 1: [2]} and line.longest == len(line) == 3
    assert line.sees().int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert Branches().longest == 0 and not Branches().children
    assert not Branches([5, 6], [TEXT, TEXT]).is_line


def test_subtree_keeps_the_paths_to_its_nodes():
    subtree = BRANCHES.subtree([0, 3, 2])
    assert (subtree.tokens_G, subtree.parents_G) == ([5, 7, 9], [TEXT, 0, TEXT])
    assert BRANCHES.subtree([0, 1, 4]).is_line and not len(BRANCHES.subtree([]))

import draw_credit


def test_the_picture_shows_what_its_titles_say(tmp_path):
    mask, cases = draw_credit.gradients()
    first, second, third = (slice(0, 6), slice(9, 13), slice(16, 24))
    sequence, token, turn = cases.values()
    for push in cases.values():
        assert not push[~mask].any()
    assert len(set(sequence[mask].tolist())) == 1 and sequence[0] > 0
    for push in (token, turn):
        assert (push[first] > 0).all() and (push[third] > push[first][0]).all()
    assert (token[second] < 0).all()
    assert not turn[second].any()
    assert draw_credit.main(["--output", str(tmp_path / "credit.png")]) == 0
    assert (tmp_path / "credit.png").read_bytes().startswith(b"\x89PNG")

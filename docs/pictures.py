"""Takes the pictures that README shows, of the page of a run of suites/all.yaml.

Run `rdiff run all -o reports/all`, then `python docs/pictures.py reports/all`; leaderboard.png, curves.png and card.png are
written beside the page. Needs playwright, and Debian's Chromium, as the tests of the page do.
"""

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu"]
HIDDEN = ("Clean", "Certified", "Alignment", "Diffused images", "Denoisers")  # of the leaderboard
SORTED = "shift:accuracy/mean"
PASSED = ("shift, clean", "shift, digits")  # charts before those of corruptions
CARD = "resnet-augmix+diffaug"
WIDTH, CURVES = 1540, 510  # CSS pixels, the latter of the first charts


def main() -> None:
    """Writes the pictures."""
    root = Path(sys.argv[1]).resolve()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": WIDTH, "height": 1000})
        page.goto((root / "index.html").as_uri())
        for name in HIDDEN:
            page.get_by_label(name, exact=True).uncheck()
        page.locator("table.sortable").get_by_role("button", name=SORTED).first.click()
        page.locator("[aria-labelledby=overview] .scroll").screenshot(path=root / "leaderboard.png")
        card = page.locator("details.card").filter(has=page.get_by_text(CARD, exact=True)).first
        card.locator("summary").click()
        card.evaluate("card => { card.style.maxHeight = '62rem'; card.style.overflow = 'hidden' }")
        card.screenshot(path=root / "card.png")
        section = page.locator("section.curves")
        section.scroll_into_view_if_needed()
        page.wait_for_timeout(500)  # it is laid out when it is seen
        for title in PASSED:
            charts = section.locator("figure").filter(has=page.get_by_text(title, exact=True))
            charts.evaluate_all("charts => charts.forEach(chart => { chart.style.display = 'none' })")
        page.locator("#curves").evaluate("heading => heading.scrollIntoView()")
        page.screenshot(path=root / "curves.png", clip={"x": 0, "y": 0, "width": WIDTH, "height": CURVES})
        browser.close()


if __name__ == "__main__":
    main()

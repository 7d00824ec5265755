"""The page of the ranking service, driven in headless Chromium the way a person with a keyboard would."""
import re
import shutil
import urllib.parse

import pytest
from ranking import HOSTILE, make_bundle

from workbench.serving.engine import Engine
from workbench.serving.packaging import running

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def engine(bundle):
    return Engine(bundle)


@pytest.fixture(scope="module")
def address(bundle):
    with running(bundle.folder) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run",
                     "disable-dev-shm-usage", "window-size=1100,900",
                     f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, address):
    "The page, open on nobody in particular, with its first ranking."
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(address)
    settle(browser)
    return browser


def settle(browser, user=None):
    "Wait until the ranking on the page is that of the listener in the field."
    from selenium.webdriver.support.ui import WebDriverWait

    def done(driver):
        current = urllib.parse.parse_qs(urllib.parse.urlparse(driver.current_url).query).get("user")
        busy, rows = (driver.find_elements("css selector", found) for found in ("[aria-busy=true]", "#items li"))
        return current and (user is None or current == [user]) and rows and not busy

    WebDriverWait(browser, 20).until(done)


def texts(browser, selector):
    "Read texts in one go: the page may replace what is found while it is looked at."
    script = "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText || e.value || '')"
    return browser.execute_script(script, selector)


def choose(browser, user, *keys):
    "Type a listener into the field, and then some keys."
    field = browser.find_element("id", "user")
    field.clear()
    field.send_keys(user, *keys)


def titles(answer):
    return [item.title for item in answer.items]


def test_it_opens_on_somebody_with_a_ranking(page, engine):
    user = page.find_element("id", "user").get_attribute("value")
    assert user == sorted(engine.users)[0]
    assert texts(page, "#items li span:first-child") == titles(engine.recommend(user_id=user))
    assert "item_knn, version 7, onnxruntime" in texts(page, "#model")
    assert re.fullmatch(r"10 items in [\d.]+ ms \([\d.]+ ms in the model\)", texts(page, "#status")[0])
    assert "(943 in the log)" in texts(page, "#total")


def test_it_shows_the_history_newest_first(page, engine):
    from selenium.webdriver.common.keys import Keys

    choose(page, "5", Keys.ENTER)
    settle(page, "5")
    newest = [engine.titles[i] for i in engine.history_of("5")[::-1][:100].tolist()]
    assert texts(page, "#history li span:first-child") == newest
    assert texts(page, "#history-count") == ["newest first, 100 of 175"]


def test_a_keyboard_is_enough(page, engine):
    "From the top of the page: tab to the field, type, set how many, and press the button."
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(*keys):
        ActionChains(page).send_keys(*keys).perform()

    def focused():
        return page.switch_to.active_element.get_attribute("id") or page.switch_to.active_element.text

    press(Keys.TAB)
    assert focused() == "Skip to the ranking"
    press(Keys.TAB)
    assert focused() == "user"
    ActionChains(page).key_down(Keys.CONTROL).send_keys("a").key_up(Keys.CONTROL).send_keys("7").perform()
    press(Keys.ESCAPE, Keys.TAB)
    assert focused() == "k"
    ActionChains(page).key_down(Keys.CONTROL).send_keys("a").key_up(Keys.CONTROL).send_keys("3").perform()
    press(Keys.TAB)
    assert focused() == "seen"
    press(Keys.TAB)
    assert focused() == "Recommend"
    outline = page.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    press(Keys.SPACE)
    settle(page, "7")
    assert texts(page, "#items li span:first-child") == titles(engine.recommend(user_id="7", k=3))


def test_an_unknown_listener_gets_the_popular_list_marked(page, engine):
    from selenium.webdriver.common.keys import Keys

    assert not page.find_element("id", "degraded").is_displayed()
    choose(page, "nobody <b>", Keys.ENTER)
    settle(page, "nobody <b>")
    mark = page.find_element("id", "degraded")
    assert mark.is_displayed() and "not in the log" in mark.text and "popular" in mark.text
    assert texts(page, "#items li span:first-child") == titles(engine.recommend(user_id="nobody"))
    assert texts(page, "#history-count") == ["none"]
    choose(page, "1", Keys.ENTER)
    settle(page, "1")
    assert not page.find_element("id", "degraded").is_displayed()


def test_a_title_is_text_whatever_it_contains(page):
    "The most popular film of this bundle is called like an attack."
    from selenium.webdriver.common.keys import Keys

    choose(page, "nobody", Keys.ENTER)
    settle(page, "nobody")
    assert texts(page, "#items li span:first-child")[0] == HOSTILE
    assert page.find_elements("css selector", "li img") == [] and page.title == "Workbench ranking"


def test_items_they_had_can_be_kept(page, engine):
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select, WebDriverWait

    choose(page, "1", Keys.ENTER)
    settle(page, "1")
    Select(page.find_element("id", "seen")).select_by_value("false")
    wanted = titles(engine.recommend(user_id="1", exclude_seen=False))
    WebDriverWait(page, 20).until(lambda driver: texts(driver, "#items li span:first-child") == wanted)
    assert wanted != titles(engine.recommend(user_id="1"))


def test_somebody_else_is_one_press_away(page, engine):
    page.find_element("id", "another").click()
    settle(page)
    user = page.find_element("id", "user").get_attribute("value")
    settle(page, user)
    assert user in engine.users


def test_the_field_suggests_listeners(page):
    from selenium.webdriver.support.ui import WebDriverWait

    choose(page, "94")
    wanted = ["94", "940", "941", "942", "943"]
    WebDriverWait(page, 20).until(lambda driver: texts(driver, "#listeners option") == wanted)


def test_every_control_has_a_name(page):
    unnamed = page.execute_script("""
        return [...document.querySelectorAll("input, select, button, a")].filter(control =>
            !(control.labels && control.labels.length) && !control.textContent.trim()
            && !control.getAttribute("aria-label")).map(control => control.outerHTML)""")
    assert unnamed == []
    assert page.find_element("id", "status").get_attribute("aria-live") == "polite"


CONTRAST = """
function light(color) {
  const parts = color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * parts[0] + .7152 * parts[1] + .0722 * parts[2];
}
function ground(element) {
  for (let at = element; at; at = at.parentElement) {
    const color = getComputedStyle(at).backgroundColor;
    if (!/, 0\\)$/.test(color)) return color;
  }
}
return [...document.querySelectorAll("h1, p, label, h2, small, li span, button, input, select, footer a")]
  .filter(found => found.offsetParent && found.textContent.trim())
  .map(found => {
    const pair = [light(getComputedStyle(found).color), light(ground(found))].sort((a, b) => b - a);
    return [(pair[0] + .05) / (pair[1] + .05), found.outerHTML.slice(0, 80)];
  }).filter(([ratio]) => ratio < 4.5)
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_both_be_read(page, scheme):
    "Every text stands out from its ground by 4.5 to 1 (WCAG 2 AA), and the grounds do differ."
    from selenium.webdriver.common.keys import Keys

    wanted = {"name": "prefers-color-scheme", "value": scheme}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [wanted]})
    choose(page, "nobody", Keys.ENTER)
    settle(page, "nobody")
    assert page.execute_script(CONTRAST) == []
    red = int(re.findall(r"\d+", page.execute_script("return getComputedStyle(document.body).backgroundColor"))[0])
    assert (red > 200) == (scheme == "light")


def test_a_narrow_screen_scrolls_one_way_only(page):
    screen = {"width": 320, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        assert page.execute_script("return document.documentElement.scrollWidth") <= 320
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_nothing_is_fetched_from_elsewhere_and_nothing_is_complained_about(page, address):
    import json

    asked = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith(address) for url in urls)
    assert [url for url in urls if not url.startswith((address, "data:", "about:", "chrome:"))] == []
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_an_error_is_told_in_the_page(page):
    "The form stops what the contract would refuse; here it is let through, and the sentence of the service is shown."
    page.execute_script("const k = document.getElementById('k'); k.removeAttribute('max'); k.value = 999;")
    page.find_element("css selector", "button.primary").click()
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(page, 20).until(lambda driver: texts(driver, "#status.error"))
    assert texts(page, "#status.error") == ["k: Input should be at most 50"] and texts(page, "#items li") == []

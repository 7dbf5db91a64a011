def render_page(findings):
    return ""

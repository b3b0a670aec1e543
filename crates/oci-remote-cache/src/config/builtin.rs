//! The upstreams that need no configuration.
//!
//! Values are written as in an environment variable and go through the same checks as everybody's. A section of the same name in the
//! file overrides them key by key.

/// An upstream that is always there.
#[derive(Debug)]
pub(super) struct BuiltIn {
    /// Its key.
    pub(super) key: &'static str,
    /// What differs from the defaults: name of the key below the section, and its value.
    pub(super) values: &'static [(&'static str, &'static str)],
}

/// All of them, by key.
pub(super) const BUILT_IN: &[BuiltIn] = &[
    BuiltIn {
        key: "docker.io",
        values: &[
            ("url", "https://registry-1.docker.io"),
            (
                "aliases",
                "index.docker.io,registry-1.docker.io,registry.hub.docker.com",
            ),
            ("library", "true"),
            ("token_realms", "auth.docker.io"),
        ],
    },
    BuiltIn {
        key: "gcr.io",
        values: &[("url", "https://gcr.io")],
    },
    BuiltIn {
        key: "ghcr.io",
        values: &[("url", "https://ghcr.io")],
    },
    // Bintray is gone since 2021, yet charts still name its host; JFrog serves the same images from its own.
    BuiltIn {
        key: "jfrog-docker-reg2.bintray.io",
        values: &[("url", "https://releases-docker.jfrog.io")],
    },
    // A vanity host in front of GitHub's registry, whose realm it names.
    BuiltIn {
        key: "lscr.io",
        values: &[("url", "https://lscr.io"), ("token_realms", "ghcr.io")],
    },
    BuiltIn {
        key: "mcr.microsoft.com",
        values: &[("url", "https://mcr.microsoft.com")],
    },
    // Names a second realm once a token has expired.
    BuiltIn {
        key: "nvcr.io",
        values: &[
            ("url", "https://nvcr.io"),
            ("token_realms", "authn.nvidia.com"),
        ],
    },
    BuiltIn {
        key: "public.ecr.aws",
        values: &[("url", "https://public.ecr.aws")],
    },
    BuiltIn {
        key: "quay.io",
        values: &[("url", "https://quay.io")],
    },
    BuiltIn {
        key: "registry.access.redhat.com",
        values: &[("url", "https://registry.access.redhat.com")],
    },
    BuiltIn {
        key: "registry.k8s.io",
        values: &[("url", "https://registry.k8s.io")],
    },
];
